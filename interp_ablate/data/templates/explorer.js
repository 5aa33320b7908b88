// The explorer: sliders to a plan, answers as they are made. Texts of a model are set as text; HTML comes escaped.
"use strict";
const $ = (id) => document.getElementById(id);
const tell = (place, text, wrong = false) => { place.textContent = text; place.className = wrong ? "error" : "soft"; };
const say = (text, wrong) => tell($("state"), text, wrong);

async function ask(path, request, onEvent, signal) {
  const response = await fetch(path, {
    method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(request), signal,
  });
  if (!response.ok) throw new Error((await response.json().catch(() => ({}))).error ?? response.statusText);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const {done, value} = await reader.read();
    rest += value ?? "";
    const lines = rest.split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const event = JSON.parse(line);
      if (event.error) throw new Error(event.error);
      if (event.waiting) say(`waiting for ${event.waiting} before it`);
      else onEvent(event);
    }
    if (done) return;
  }
}

const bands = [...document.querySelectorAll("#sliders .slider")].map((band) => ({
  on: band.querySelector(".on"), range: band.querySelector("[type=range]"), shown: band.querySelector("output"),
}));
const wanted = () => ({
  prompt: $("prompt").value, max_new_tokens: $("limit").valueAsNumber, direction: Number($("direction").value),
  plan: $("plan").value, strength: $("strength").valueAsNumber,
  controls: {
    operation: document.querySelector("[name=operation]:checked").value, direction: Number($("direction").value),
    amounts: bands.map((band) => (band.on.checked ? Number(band.range.value) : null)),
  },
});
const modes = () => {
  $("sliders").disabled = Boolean($("plan").value);
  $("times").hidden = !$("plan").value;
};
modes();

let running = null;
async function answer() {
  running?.abort();
  const mine = (running = new AbortController());
  if (!$("prompt").value.trim()) return say("type a prompt");
  say("answering …");
  $("edited").replaceChildren();
  $("unedited").replaceChildren();
  const began = performance.now();
  let first = 0, scale = 1e-9;
  try {
    await ask("answer", wanted(), (event) => {
      if (mine.signal.aborted) return;
      if (event.side) {
        first ||= performance.now() - began;
        const span = make("span", {}, event.text);
        if (event.values) {
          const shown = event.values[event.layers.indexOf(event.layer)];
          scale = Math.max(scale, Math.abs(shown));
          span.style.background = `color-mix(in srgb, var(${shown > 0 ? "--s0" : "--s1"}) ${Math.round(45 * Math.abs(shown) / scale)}%, transparent)`;
          span.title = event.values.map((value, k) => `${event.layers[k]}: ${value.toFixed(2)}`).join("  ");
        }
        $(event.side).append(span);
      } else if (event.scores) {
        const cell = (value) => make("td", {}, typeof value === "number" ? value.toPrecision(3) : value ?? "–");
        $("scores").tBodies[0].replaceChildren(...event.scores.map((row) => make("tr", {}, cell(row.name), cell(row.edited), cell(row.unedited))));
        $("scores").hidden = false;
        say(`first token after ${Math.round(first)} ms`);
      } else {
        $("edited").innerHTML = event.edited;
        $("unedited").innerHTML = event.unedited;
      }
    }, mine.signal);
  } catch (error) {
    if (error.name !== "AbortError") say(error.message, true);
  }
}
async function into(id, path, request) {
  const place = $(id), told = make("p", {});
  tell(told, "working …");
  place.hidden = false;
  place.replaceChildren(told); // where it was asked for: the state may be out of sight
  try {
    say("working …");
    await ask(path, request, (event) => {
      place.innerHTML = event.html;
      place.ids = event.ids;
      for (const table of place.querySelectorAll("table")) { if (table.tHead) sortable(table); }
      for (const chart of place.querySelectorAll(".chart")) hoverable(chart);
      say("");
    });
  } catch (error) {
    say("");
    tell(told, error.message, true);
  }
}

$("prompt-form").addEventListener("submit", (event) => { event.preventDefault(); answer(); });
$("controls").addEventListener("submit", (event) => event.preventDefault());
$("show-tokens").addEventListener("click", () => into("tokens", "tokens", wanted()));
$("tokens").addEventListener("click", (event) => {
  const token = event.target.closest(".t");
  if (!token) return;
  const index = [...$("tokens").querySelectorAll(".t")].indexOf(token);
  into("attribution", "attribution", {ids: $("tokens").ids, index, direction: Number($("direction").value)});
});
$("tokens").addEventListener("keydown", (event) => { if (event.key === "Enter") event.target.closest(".t")?.click(); });
let later = 0;
$("controls").addEventListener("input", (event) => {
  for (const band of bands) {
    if (event.target === band.range) band.on.checked = true;
    band.shown.textContent = Number(band.range.value).toFixed(2).replace(/\.?0+$/, "");
  }
  modes();
  if (event.target === $("name") || !$("live").checked || !$("prompt").value.trim()) return;
  clearTimeout(later);
  later = setTimeout(answer, 100);
});
$("keep").addEventListener("click", async () => {
  tell($("kept"), "keeping …");
  try {
    await ask("keep", {...wanted(), name: $("name").value.trim()}, (event) => {
      tell($("kept"), `kept: ${event.path}`);
      const chosen = $("plan").value;
      $("plan").replaceChildren(make("option", {value: ""}, "from the sliders"), ...event.plans.map((name) => make("option", {}, name)));
      $("plan").value = chosen;
    });
  } catch (error) { tell($("kept"), error.message, true); }
});

let turns = [];
$("chat-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const text = $("said").value;
  if (!text.trim()) return;
  const mine = make("p", {className: "user"}, text), theirs = make("p", {className: "assistant"});
  $("turns").append(mine, theirs);
  $("said").value = "";
  try {
    await ask("chat", {...wanted(), prompt: text, turns}, (piece) => theirs.append(piece.text));
    turns.push({role: "user", content: text}, {role: "assistant", content: theirs.textContent});
  } catch (error) {
    tell(theirs, error.message, true);
    $("said").value ||= text;
  }
});
$("forget").addEventListener("click", () => { turns = []; $("turns").replaceChildren(); });
$("projections")?.addEventListener("mark", (event) => { $("layer-number").value = event.detail; into("layer", "layer", {layer: event.detail}); });
$("show-layer")?.addEventListener("click", () => into("layer", "layer", {layer: $("layer-number").value}));
$("trials-chart")?.addEventListener("mark", (event) => into("trial", "trial", {trial: event.detail}));
$("trials-table")?.addEventListener("click", (event) => { if (event.target.matches(".trial")) into("trial", "trial", {trial: event.target.value}); });
