"""`privimage plan`: figures of the paper's configurations, and its warnings."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import REPOSITORY, TINY

from privimage.commands.plan import plan_run, show
from privimage.commands.promise import beginning, promise
from privimage.config import Config, load, parse
from privimage.errors import UserError
from privimage.recipes.usefulness import busy

CONFIGS = REPOSITORY / "configs"
TREE = {
    "run": {"dir": "runs/x"},
    "data": {"resolution": 8, "public": {"kind": "glyphs"}, "sensitive": {"kind": "npz", "path": "x"}},
}


def said(capsys: pytest.CaptureFixture, config: Path, *overrides: str) -> str:
    show(load(config, list(overrides)))
    return " ".join(capsys.readouterr().out.split())


def test_the_papers_cifar10_has_its_parameters_and_noise(capsys: pytest.CaptureFixture):
    """The noise of its other budgets is in test_accounting."""
    text = said(capsys, CONFIGS / "paper" / "cifar10-eps10.yaml", "runtime.device=cpu")
    assert "1,754,499 parameters" in text
    assert "2.171" in text.split("(the same alone)")[1]
    assert "(the same noise by RDP: 10.82" in text
    # Good for nothing but a GPU, which is told with the stage that takes longest.
    assert text.count("warning") == 1
    assert re.search(
        r"run.hours: about [\d,]+ hours on this machine, and the run may take 2; most of it is", text
    )


def test_both_networks_of_a_gan_are_counted_and_its_steps_are_those_of_the_discriminator(
    capsys: pytest.CaptureFixture,
):
    text = said(capsys, TINY, "method=nonprivg")
    assert "generator: 164,993 parameters discriminator: 67,043 parameters" in text
    assert "│ pretrain │ 24 │ 32 │" in text and "│ finetune │ 8 │ 64 │" in text


def test_a_query_whose_noise_is_loud_beside_a_small_set_is_told(capsys: pytest.CaptureFixture):
    loud, quiet = (
        said(capsys, CONFIGS / "quickstart.yaml", "privacy.epsilon=1", f"select.max_rise={rise}")
        for rise in (0.005, 0.2)
    )
    assert re.search(
        r"warning: noise of 3\d\.\d votes per bin is large beside the 144 votes of a sensitive class", loud
    )
    assert "warning" not in quiet


@pytest.mark.parametrize(
    ("average", "threads", "policy", "told"),
    [
        (900.0, None, None, True),
        (0.1, None, None, False),
        (900.0, 1, None, False),
        (900.0, None, "passive", False),
    ],
)
def test_a_machine_that_other_work_keeps_busy_is_told(
    average: float, threads: int | None, policy: str | None, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (average, average, average))
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)  # tests have one
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if policy:
        monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    config = parse({**TREE, "runtime": {"threads": threads}})
    assert [line[:16] for line in busy(config, "cpu")] == ["runtime.threads:"] * told


def test_classifiers_that_learn_from_real_images_are_counted(tmp_path: Path) -> None:
    """As many as there are synthetic ones, of the 1,437 that the set has."""
    for samples, real in ((1000, 1000), (3000, 1437)):
        found = []
        for ceiling in (False, True):
            given = {"evaluate.ceiling": ceiling, "synthesize.samples": samples, "run.dir": tmp_path / "run"}
            config = load(TINY, ["method=dpdm", *(f"{key}={value}" for key, value in given.items())])
            found.append(next(one for one in plan_run(config).work if one.stage == "evaluate"))
        assert [one.images for one in found] == [samples, samples + real]
        assert found[1].seconds / found[0].seconds == pytest.approx((samples + real) / samples)


def test_a_delta_of_more_than_one_in_n_is_told(capsys: pytest.CaptureFixture):
    assert "is not below 1/N" in said(
        capsys, CONFIGS / "quickstart.yaml", "method=dpdm", "privacy.delta=0.01", "privacy.epsilon=1"
    )


def test_a_warm_start_that_drowns_in_noise_is_told(capsys: pytest.CaptureFixture):
    """1,437 images at epsilon 1 are too few, 60,000 are enough."""
    few, many = (
        said(
            capsys, CONFIGS / "quickstart.yaml", "method=dpdm", "privacy.epsilon=1", "privacy.accountant=rdp",
            "warm.starts=[embedding]", "warm.max_rise=0.02", "warm.steps=4", *more,
        )
        for more in ((), ("data.sensitive.kind=npz", "data.sensitive.count=60000"))
    )  # fmt: skip
    assert "the noise of the warm start's embedding is about" in few
    assert "warm start's embedding is" not in many
    assert "warm match" in few  # the generator that the warm start trains first takes time too


def test_a_method_without_pretraining_is_planned_where_its_steps_are_left_to_be_chosen(
    capsys: pytest.CaptureFixture,
) -> None:
    open_ = ["pretrain.steps=auto", "pretrain.batch_size=auto", "data.sensitive.count=1437"]
    show(load(TINY, ["method=dpdm", "data.sensitive.classes=10", *open_]))
    assert "pretrain" not in capsys.readouterr().out.split("stage")[-1]


def test_a_set_of_unknown_size_is_a_mistake_in_one_line():
    with pytest.raises(UserError, match=r"^data\.sensitive\.count: "):
        show(load(TINY, ["data.sensitive.kind=folder", "data.sensitive.path=nowhere"]))


def test_a_plan_does_not_load_the_compiler_of_torch() -> None:
    """It takes more than a second of `plan`; optimizers, and embeddings on the meta device, load it."""
    configuration = str(REPOSITORY / "configs/quickstart.yaml")
    code = (
        "import sys\nfrom privimage.commands.plan import plan_run\nfrom privimage.config import load\n"
        f"plan_run(load({configuration!r}))\nprint('torch._dynamo' in sys.modules)"
    )
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert seen.stdout.splitlines()[-1] == "False"


def test_a_promise_is_found_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine is measured meanwhile. What comes back is what would be found here, or the mistake."""
    config = load(TINY, ["method=dpdm", "privacy.accountant=pld"])
    with beginning(config, 1437) as found:
        assert found() == promise(config, 1437)

    def mistaken(config: Config, count: int) -> None:
        raise UserError(f"process {os.getpid()}")

    monkeypatch.setattr("privimage.commands.promise.make_plan", mistaken)
    with pytest.raises(UserError, match=r"^process \d+$") as raised:
        plan_run(config)
    assert str(os.getpid()) not in str(raised.value)
    # On a single core it would take from what is measured, twice its time.
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    with pytest.raises(UserError, match=f"^process {os.getpid()}$"):
        plan_run(config)
