"""A session of the explorer: one model, its directions and plans, and what is asked of them, one thing after another.

What a page shows as it is made comes as events: small JSON objects, in order.

Knows: answers with and without a plan, their scores, tokens, attributions, kept plans. Does not know: HTTP, or the page.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from interp_ablate.activations.token_html import tokens_html
from interp_ablate.activations.token_view import token_projections
from interp_ablate.circuits.attribution import attribute
from interp_ablate.directions.direction import Direction
from interp_ablate.directions.direction_set import one_per_layer
from interp_ablate.display import html_table, marked_differences
from interp_ablate.edits.plan import Plan, ablate_layers
from interp_ablate.errors import RunError
from interp_ablate.evaluation.metrics import kl_divergence
from interp_ablate.evaluation.outputs import ModelOutputs
from interp_ablate.explorer.controls import Controls
from interp_ablate.models.conversation import Conversation
from interp_ablate.models.model import Model, check_model
from interp_ablate.models.thinking import Generation
from interp_ablate.prompts.messages import message_of
from interp_ablate.prompts.prompt import Prompt
from interp_ablate.runs.kept_plans import keep_plan, plan_named, plan_names
from interp_ablate.runs.run_folder import Run
from interp_ablate.scoring.expressions import ExpressionScorer
from interp_ablate.search.edit_space import plan_of
from interp_ablate.search.trial_table import params_of, read_trials

Event = dict[str, Any]
REMEMBERED = 16  # unedited answers
LONGEST_ANSWER, USUAL_ANSWER = 512, 48  # tokens
# with what the template adds: a pass over a prompt cannot be stopped, and whoever asks next waits for it
LONGEST_PROMPT = 1024
TOP_TERMS = 25


class ExplorerSession:
    """One model with directions, over a folder; its methods are called from one thread at a time.

    Args:
        folder: where plans are kept (`plans/`), and whose own plans are offered.
        run: the run folder's run, for its trials.
        expression: scores answers.
    """

    def __init__(
        self,
        model: Model,
        directions: Sequence[Direction],
        folder: str | Path,
        *,
        run: Run | None = None,
        expression: ExpressionScorer | None = None,
    ) -> None:
        check_model(model)
        self.model, self.directions, self.folder = model, list(directions), Path(folder)
        self.run, self.expression = run, expression
        self._unedited: OrderedDict[tuple[Any, ...], Generation] = OrderedDict()
        if not self.directions:
            raise RunError("there are no directions to explore")

    def by_layer(self, number: int) -> list[Direction]:
        """One direction a layer: those of the point, the position and the method of that one."""
        like = self.directions[number]
        alike = [d for d in self.directions if d.is_of(like.position, like.method)]
        return one_per_layer(alike, like.site.point)

    def warm_up(self) -> None:
        """Answer once, so that what is measured of the model before its first answer is not waited for later.

        What may be shared between passes is measured at a length: that of an answer of the page's usual size.
        """
        middle = len(self.directions) // 2
        plan = ablate_layers(self.model, self.directions[middle])
        for _ in self._streamed(Prompt("Hello " * 24), plan, USUAL_ANSWER, self.by_layer(middle)):
            break

    def plan(self, request: Mapping[str, Any]) -> Plan:
        """The plan that a page asks for: one by name, times a strength, or that of its sliders.

        Raises:
            RunError, PlanError: no such plan, controls that cannot be read.
        """
        if request.get("plan"):
            plan = plan_named(self.folder, str(request["plan"]))
            strength = _number(request.get("strength", 1.0))
            return plan if strength == 1 else plan.times(strength)
        return Controls.from_dict(request.get("controls")).plan(self.model, self.directions)

    def answer(self, request: Mapping[str, Any]) -> Iterator[Event]:
        """The prompt answered under the plan and without it, token by token, then scores and marked differences."""
        prompt, limit = _prompt(request), _limit(request)
        outputs = ModelOutputs(self.model, [prompt], max_new_tokens=limit)
        _check_length(len(outputs.rows[0]))
        plan = self.plan(request)
        chosen = self._direction(request)
        after = yield from self._answered("edited", prompt, plan, limit, chosen)
        key = (tuple(outputs.rows[0]), limit)
        before = self._unedited.get(key)
        if before is None:
            before = yield from self._answered("unedited", prompt, Plan(), limit)
            self._unedited[key] = before
            while len(self._unedited) > REMEMBERED:
                self._unedited.popitem(last=False)
        yield {
            "unedited": marked_differences(after.text, before.text),
            "edited": marked_differences(before.text, after.text),
        }
        yield {"scores": self._scores(outputs, plan, before, after)}

    def _answered(
        self, side: str, prompt: Prompt, plan: Plan, limit: int, chosen: int | None = None
    ) -> Generator[Event, None, Generation]:
        """An event a token as it is made, with its projections by layer if a direction is chosen; returns the answer."""
        ids: list[int] = []
        watched, places = [], {}
        if chosen is not None:
            watched = self.by_layer(chosen)
            layers = [each.site.layer for each in watched]
            places = {"layers": layers, "layer": self.directions[chosen].site.layer}
        for token, values in self._streamed(prompt, plan, limit, watched):
            ids.append(token.id)
            seen = {"values": [round(value, 4) for value in values]} if watched else {}
            yield {"side": side, "text": token.text, **seen, **places}
        return Generation(tuple(ids), self.model.decode(ids), len(ids) < limit)

    def _streamed(
        self, prompt: Prompt, plan: Plan, limit: int, watched: Sequence[Direction]
    ) -> Iterator[Any]:
        with self.model.applied(plan):
            yield from self.model.monitor(prompt, watched, max_new_tokens=limit)

    def _scores(
        self, outputs: ModelOutputs, plan: Plan, before: Generation, after: Generation
    ) -> list[Event]:
        """KL at the first token and along the unedited answer, and what the expressions say of both answers."""
        edited = outputs.fresh(plan if plan.edits else None)
        # of an empty answer any token: what follows the prompt is read before it
        along = [before.tokens or (0,)]
        sides = [each.continuation_logprobs(along)[0] for each in (outputs, edited)]
        kl = kl_divergence(*sides)
        rows: list[Event] = [{"name": "KL, first token (nats)", "edited": float(kl[0])}]
        if before.tokens:
            rows.append(
                {"name": "KL a token, along the unedited answer", "edited": float(kl.mean())}
            )
        if self.expression is not None:
            texts = {"unedited": before.text, "edited": after.text}
            said = {side: self.expression.outcome(text) for side, text in texts.items()}
            rows.append({"name": f"expressions {self.expression.label}", **said})
        return rows

    def tokens(self, request: Mapping[str, Any]) -> Event:
        """The prompt and its answer as coloured tokens, under the plan."""
        prompt, plan = self._read(_prompt(request)), self.plan(request)
        along, limit = self.by_layer(self._direction(request)), _limit(request)
        with self.model.applied(plan):
            view = token_projections(self.model, prompt, along, max_new_tokens=limit)
        ids = [token.id for token in view.tokens]
        return {"html": tokens_html(view, layer=self._layer(request)), "ids": ids}

    def attribution(self, request: Mapping[str, Any]) -> Event:
        """Who wrote the projection of one token of an unedited text, the largest terms first."""
        ids, index = request.get("ids"), request.get("index")
        if not (isinstance(ids, list) and isinstance(index, int) and 0 <= index < len(ids)):
            raise RunError("attribution is of a token of a text: give its ids and an index")
        _check_length(index + 1)
        direction = self.directions[self._direction(request)]
        # what follows a token writes nothing to it
        whole = attribute(self.model, [list(map(int, ids[: index + 1]))], direction, positions=-1)
        frame = whole.of_token(0, -1).head(TOP_TERMS)
        rows = [(row.term, float(row.value)) for row in frame.itertuples()]
        text = self.model.tokenizer.decode([int(ids[index])]) if self.model.tokenizer else ""
        caption = (
            f"Token {index} {text!r}, read without a plan: the {len(rows)} largest of {len(whole.terms)} terms of "
            f"{float(whole.projection[0]):.4g} along {direction.name}; sum and projection differ by "
            f"{whole.error:.1e} of all terms' sizes"
        )
        return {"html": html_table(("written by", "along the direction"), rows, caption=caption)}

    def chat(self, request: Mapping[str, Any]) -> Iterator[Event]:
        """The next answer of a conversation under the plan."""
        turns = request.get("turns") or []
        if not isinstance(turns, list):
            raise RunError("turns are a list of messages")
        said = [message_of(each, f"turns[{i}]") for i, each in enumerate(turns)]
        text = _prompt(request).text
        self._read(Prompt(text, None, tuple(said)))
        talk = Conversation(self.model, None, _limit(request), turns=said)
        for piece in talk.say(text, self.plan(request)):
            yield {"text": piece}

    def keep(self, request: Mapping[str, Any]) -> Event:
        """Keep the plan under a name, for `export --plan`."""
        path = keep_plan(self.folder, str(request.get("name") or ""), self.plan(request))
        return {"path": str(path), "plans": plan_names(self.folder)}

    def trial(self, request: Mapping[str, Any]) -> Event:
        """A trial's plan, and its answers to some validation prompts beside the unedited ones."""
        if self.run is None:
            raise RunError("trials are a run's, and no run folder was given")
        frame = read_trials(self.run.out / "trials.csv")
        rows = frame[frame["trial"].astype(str) == str(request.get("trial"))]
        if rows.empty:
            raise RunError(f"there is no trial {request.get('trial')!r:.40}")
        plan = plan_of(params_of(rows.iloc[0].to_dict()), self.run.edit_space())
        split, limit = self.run.split.validation, self.run.configuration.max_new_tokens
        prompts = [*split.positive[:2], *split.negative[:1]]
        before = self.model.generate(prompts, max_new_tokens=limit)
        with self.model.applied(plan):
            after = self.model.generate(prompts, max_new_tokens=limit)
        answers = [
            (p.text, marked_differences(b.text, a.text), marked_differences(a.text, b.text))
            for p, a, b in zip(prompts, after, before)
        ]
        return {
            "html": html_table(("the plan's edits",), [(repr(edit),) for edit in plan])
            + html_table(("validation prompt", "edited", "unedited"), answers, caption="answers")
        }

    def _read(self, prompt: Prompt) -> Prompt:
        """The prompt, if it is not too long for a page."""
        _check_length(len(self.model.encode_all([prompt])[0]))
        return prompt

    def _direction(self, request: Mapping[str, Any]) -> int:
        number = request.get("direction", 0)
        if not (isinstance(number, int) and 0 <= number < len(self.directions)):
            raise RunError(f"there are directions 0 to {len(self.directions) - 1}")
        return number

    def _layer(self, request: Mapping[str, Any]) -> int:
        return self.directions[self._direction(request)].site.layer


def _prompt(request: Mapping[str, Any]) -> Prompt:
    return Prompt(str(request.get("prompt") or ""), request.get("system") or None)


def _check_length(n_tokens: int) -> None:
    if n_tokens > LONGEST_PROMPT:
        raise RunError(
            f"the page takes texts of at most {LONGEST_PROMPT} tokens, the chat template's included; this one has "
            f"{n_tokens}. Make it shorter, or use `Model.generate` and `token_projections` in Python"
        )


def _limit(request: Mapping[str, Any]) -> int:
    number = request.get("max_new_tokens", USUAL_ANSWER)
    if not (isinstance(number, int) and 1 <= number <= LONGEST_ANSWER):
        raise RunError(f"an answer has 1 to {LONGEST_ANSWER} tokens; got {number!r:.40}")
    return number


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise RunError(f"a strength is a number; got {value!r:.40}") from error
