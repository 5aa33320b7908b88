// Tables that sort and filter, answers that open together, charts that tell the nearest mark.
// Everything can be read without this script; it only adds.
"use strict";
const make = (tag, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};
const numberIn = (text) => {
  const found = text.trim().match(/^[-+]?(\d+\.?\d*(e[-+]?\d+)?|inf)/i);
  return found ? (/inf/i.test(found[0]) ? Infinity * (found[0][0] === "-" ? -1 : 1) : parseFloat(found[0])) : NaN;
};

function sortable(table) {
  const body = table.tBodies[0];
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = make("button", {type: "button", className: "sort"}, ...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...body.rows].map((row, place) => {
        const text = row.cells[column]?.textContent ?? "";
        return {row, place, text, value: numberIn(text)};
      });
      rows.sort((a, b) => {
        const numeric = Number.isNaN(a.value) - Number.isNaN(b.value);
        if (numeric) return numeric; // what is no number comes last, both ways
        const order = Number.isNaN(a.value) ? a.text.localeCompare(b.text) : a.value === b.value ? 0 : a.value - b.value;
        return (down ? -order : order) || a.place - b.place;
      });
      body.append(...rows.map((each) => each.row));
    });
  });
}

function filterable(table) {
  const rows = table.tBodies[0].rows;
  if (rows.length < 6) return;
  const count = make("span", {className: "soft", role: "status"});
  const input = make("input", {type: "search", placeholder: "filter rows"});
  input.setAttribute("aria-label", "Filter rows");
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
      shown += !row.hidden;
    }
    count.textContent = words.length ? ` ${shown} of ${rows.length} rows` : "";
  });
  (table.closest(".scroll") ?? table).before(make("p", {className: "tools"}, input, count));
}

function hoverable(chart) {
  const svg = chart.querySelector("svg");
  const marks = [...svg.querySelectorAll("title")].map((title) => {
    const mark = title.parentNode;
    mark.said = title.textContent;
    title.remove(); // the browser would show it too, later
    return mark;
  });
  const tip = make("div", {className: "tip", hidden: true});
  chart.append(tip);
  let places = null, width = 0, marked = null;
  const nearest = (event) => {
    const frame = svg.getBoundingClientRect();
    if (!places || width !== frame.width) {
      width = frame.width;
      places = marks.map((mark) => {
        const box = mark.getBoundingClientRect();
        return [box.x + box.width / 2 - frame.x, box.y + box.height / 2 - frame.y, Math.max(14, box.width / 2)];
      });
    }
    const x = event.clientX - frame.x, y = event.clientY - frame.y;
    let best = -1, least = Infinity;
    places.forEach(([px, py, reach], i) => {
      const distance = Math.hypot(px - x, py - y);
      if (distance < least && distance <= reach) [best, least] = [i, distance];
    });
    return best;
  };
  svg.addEventListener("pointermove", (event) => {
    const i = nearest(event);
    marked?.classList.remove("on");
    marked = i < 0 ? null : marks[i];
    tip.hidden = i < 0;
    if (i < 0) return;
    marked.classList.add("on");
    tip.textContent = marked.said;
    const frame = chart.getBoundingClientRect(), box = svg.getBoundingClientRect();
    tip.style.left = `${Math.min(places[i][0] + box.x - frame.x, frame.width - Math.min(280, frame.width))}px`;
    tip.style.top = `${places[i][1] + box.y - frame.y + 14}px`;
  });
  svg.addEventListener("pointerleave", () => { tip.hidden = true; marked?.classList.remove("on"); });
  svg.addEventListener("click", (event) => {
    const i = nearest(event);
    if (i >= 0 && marks[i].dataset.key) chart.dispatchEvent(new CustomEvent("mark", {detail: marks[i].dataset.key, bubbles: true}));
  });
}

function answersOf(section) {
  const all = [...section.querySelectorAll("details.answer")];
  if (!all.length) return;
  const open = make("button", {type: "button"}, "Expand all");
  open.addEventListener("click", () => {
    const opened = open.textContent === "Expand all";
    for (const each of all) each.open = opened;
    open.textContent = opened ? "Close all" : "Expand all";
  });
  const box = make("input", {type: "checkbox"});
  const count = make("span", {className: "soft", role: "status"});
  box.addEventListener("change", () => {
    for (const each of all) each.hidden = box.checked && !each.hasAttribute("data-changed");
    count.textContent = box.checked ? ` ${all.filter((each) => !each.hidden).length} of ${all.length}` : "";
  });
  section.querySelector("h2").after(make("p", {className: "tools"}, open, make("label", {}, box, " changed answers only"), count));
}

function enhance(root) {
  for (const table of root.querySelectorAll("table.sortable")) { filterable(table); sortable(table); }
  for (const chart of root.querySelectorAll(".chart")) hoverable(chart);
}
enhance(document);
for (const section of document.querySelectorAll("section#generations")) answersOf(section);
