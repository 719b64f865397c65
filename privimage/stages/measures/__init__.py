"""The measures of an evaluation. A new one is one file and one line here."""

from privimage.stages.measures.agreement import AGREEMENT
from privimage.stages.measures.fidelity import FIDELITY
from privimage.stages.measures.memorization import MEMORIZATION
from privimage.stages.measures.promise import PROMISE
from privimage.stages.measures.selection import SELECTION
from privimage.stages.measures.sets import SETS
from privimage.stages.measures.subject import Finished, Measure, Subject
from privimage.stages.measures.utility import UTILITY

MEASURES: tuple[Measure, ...] = (UTILITY, AGREEMENT, FIDELITY, MEMORIZATION, PROMISE, SETS, SELECTION)

__all__ = ["MEASURES", "Finished", "Measure", "Subject"]
