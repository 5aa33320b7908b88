"""What another package adds through entry points: ten lines of it are enough, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from interp_ablate.directions.estimators import estimator_named
from interp_ablate.errors import ExportError, InterpAblateError
from interp_ablate.models.architectures import architecture_of, table
from interp_ablate.plots.run_figures import save_figures
from interp_ablate.prompts.prompt import Prompt
from interp_ablate.scoring.exchange import PromptResponse
from interp_ablate.scoring.registry import make_scorer
from interp_ablate.sites import Site

SCORER = """
from interp_ablate.scoring import ExplainingScorer, ScorerKind, Verdict

class Shouting(ExplainingScorer):
    name = "shouting"
    identity = {"kind": "shouting"}

    def judged(self, exchanges):
        return [Verdict(100.0 * e.answer.isupper()) for e in exchanges]

KIND = ScorerKind(lambda name, options: Shouting(), "shouting:loud", cost=1)
"""

ESTIMATOR = """
from dataclasses import replace
from interp_ablate.directions import difference_in_means

def first_pair(positive, negative, site, *, position="-1", source=""):
    direction = difference_in_means(
        positive[:1], negative[:1], site, position=position, source=source
    )
    return None if direction is None else replace(direction, method="first_pair")
"""

PLOT = """
from interp_ablate.plots import new_figure

def names(folder):
    figure = new_figure(height=2.0)
    figure.suptitle(folder.name)
    return {"names.png": figure}
"""


ARCHITECTURE = """
from interp_ablate.models import Architecture
from interp_ablate.models.architectures import Writer

ENTRY = Architecture(
    embed="body.embed.weight", unembed="head.weight",
    attn=((Writer("body.{layer}.attn.out.weight"),),), mlp=((Writer("body.{layer}.mlp.out.weight"),),),
    families="Toys", prefix="body.",
)
"""


def install(place: Path, module: str, code: str, **groups: str) -> None:
    """Write a module, and the folder that makes it look like an installed distribution."""
    (place / f"{module}.py").write_text(code)
    info = place / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    lines = [f"[interp_ablate.{group}]\n{entry}\n" for group, entry in groups.items()]
    (info / "entry_points.txt").write_text("\n".join(lines))


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_a_scorer_of_another_package(outside: Path) -> None:
    install(outside, "shouting_scorer", SCORER, scorers="shouting = shouting_scorer:KIND")
    answers = [PromptResponse(Prompt("?"), text) for text in ("NO WAY", "no way", "")]
    assert make_scorer("shouting:loud")(answers) == [100.0, 0.0, None]
    assert make_scorer("shouting:-loud")(answers) == [0.0, 100.0, None]
    with pytest.raises(InterpAblateError, match=r"no scorer 'whisper:x'.*shouting:"):
        make_scorer("whisper:x")
    with pytest.raises(InterpAblateError, match="no option pitch"):
        make_scorer("shouting:loud?pitch=3")


def test_a_scorer_that_is_none_is_refused_by_its_package(outside: Path) -> None:
    install(outside, "odd_scorer", "KIND = 3\n", scorers="odd = odd_scorer:KIND")
    with pytest.raises(InterpAblateError, match=r"odd_scorer.*'odd'.*a int.*ScorerKind"):
        make_scorer("odd:x")


def test_an_estimator_of_another_package(outside: Path) -> None:
    entry = "first_pair = pair_estimator:first_pair"
    install(outside, "pair_estimator", ESTIMATOR, estimators=entry)
    positive, negative = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    direction = estimator_named("first_pair")(positive, negative, Site(2, "resid_post"))
    gap = (positive[0] - negative[0]).double()
    assert direction is not None and direction.method == "first_pair"
    torch.testing.assert_close(direction.vector.double(), gap / gap.norm())


def test_a_plot_of_another_package(outside: Path) -> None:
    install(outside, "name_plot", PLOT, plots="names = name_plot:names")
    (outside / "run").mkdir()
    assert save_figures(outside / "run") == [outside / "run" / "figures" / "names.png"]


def test_an_architecture_of_another_package(outside: Path) -> None:
    install(outside, "toy_models", ARCHITECTURE, architectures="toy = toy_models:ENTRY")
    entry = architecture_of(SimpleNamespace(model_type="toy", architectures=["ToyLM"]))
    names = ["body.0.attn.out.weight", "body.0.mlp.out.weight"]
    assert entry.writers(Site(0, "mlp_out"), names, None) == {names[1]: "linear"}
    assert [row["families"] for row in table() if row["model_type"] == "toy"] == ["Toys"]
    with pytest.raises(ExportError, match=r"entries for llama, .*, toy "):
        architecture_of(SimpleNamespace(model_type="other", architectures=["OtherLM"]))


def test_an_architecture_that_is_none_is_refused_by_its_package(outside: Path) -> None:
    install(outside, "odd_models", "ENTRY = 3\n", architectures="odd = odd_models:ENTRY")
    with pytest.raises(ExportError, match=r"odd_models registers 'odd'.*a int: an Architecture"):
        architecture_of(SimpleNamespace(model_type="odd", architectures=["OddLM"]))
