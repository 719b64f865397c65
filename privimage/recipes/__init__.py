"""What suits a set and a machine: values for all settings that are left at `auto`, and what a run will cost.

Everything is chosen from public facts: N, the number of classes, the shape of the images, the public set, the
promise, the time that the run may take, and the speed of the machine. No pixel and no label is looked at.
"""

from privimage.recipes.choice import Choice, automatic
from privimage.recipes.choose import choose
from privimage.recipes.facts import Facts, facts_of
from privimage.recipes.settle import as_begun, settled

__all__ = ["Choice", "Facts", "as_begun", "automatic", "choose", "facts_of", "settled"]
