"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const by = (id) => document.getElementById(id);
const stage = by("tokens").parentElement;
const boxes = [...document.querySelectorAll(".kinds input")];
const series = Object.fromEntries(boxes.map((box) => [box.value, box.dataset.series]));
const percent = (share) => Math.round(100 * share) + " %";
let chosen = data.token;

function element(name, text, attributes = {}) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

const numbers = Array.from({ length: data.end - data.begin }, (_, at) => data.begin + at);
const spans = numbers.map((token) => {
  return element("span", data.texts[token], { role: "option", id: "t" + token, title: "token " + token, "aria-selected": "false" });
});
if (data.begin) {
  by("tokens").append(element("span", "⋯ " + data.begin.toLocaleString("en") + " tokens before", { class: "before", id: "before" }));
}
spans.forEach((span) => {
  by("tokens").append(span);
  if (span.textContent.includes("↵")) by("tokens").append(element("br"));
});

function option(value, text) { return element("option", text, { value }); }
by("layer").append(option("", "all"));
data.layers.forEach((name, layer) => {
  if (name === "deformer") by("layer").append(option(layer, layer + 1));
});
function fillHeads() {
  const old = by("head").value;
  const numbers = [...new Set(data.heads.map((head) => head.head))];
  const kind = (number) => data.heads.find((head) => head.head === number).kind;
  by("head").replaceChildren(option("", "all"), ...numbers.map((n) => option(n, n + 1 + ", " + kind(n))));
  by("head").value = old;
}
fillHeads();

// What is read by the heads that are shown.
function shown() {
  const kinds = new Set(boxes.filter((box) => box.checked).map((box) => box.value));
  const [layer, head] = [by("layer").value, by("head").value];
  return data.heads.filter((one) => kinds.has(one.kind)
    && (layer === "" || one.layer === Number(layer)) && (head === "" || one.head === Number(head)));
}

// Per kind: row -> mean share over its heads that are shown, and the rows that anchored heads measure from.
function gather(heads, at) {
  const kinds = new Map();
  for (const head of heads) {
    if (!kinds.has(head.kind)) kinds.set(head.kind, { heads: 0, rows: new Map(), anchors: new Set() });
    const kind = kinds.get(head.kind);
    kind.heads += 1;
    for (const [row, share] of head.rows[at]) kind.rows.set(row, (kind.rows.get(row) || 0) + share);
    if (!["now", "box"].includes(head.kind) && head.origins[at] >= 0) kind.anchors.add(head.origins[at]);
  }
  for (const kind of kinds.values()) for (const [row, sum] of kind.rows) kind.rows.set(row, sum / kind.heads);
  return kinds;
}

function place(row) {
  const span = spans[row - data.begin] || by("before");
  const [box, frame] = [span.getBoundingClientRect(), stage.getBoundingClientRect()];
  const left = box.left - frame.left + stage.scrollLeft;
  return { x: left + box.width / 2, y: box.top - frame.top + stage.scrollTop + 2, bottom: box.height };
}

function shape(name, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  by("arcs").append(made);
}

function arc(from, to, color, share, number) {
  const look = { stroke: color, "stroke-width": 1 + 4.5 * share, "stroke-opacity": 0.35 + 0.6 * share, "stroke-linecap": "round" };
  if (from.x === to.x && from.y === to.y) {
    shape("circle", { cx: from.x, cy: from.y - 7 - 2 * number, r: 3 + 3 * share, ...look });
    return;
  }
  const lift = 11 + 3 * number + Math.min(16, Math.abs(to.x - from.x) / 12);
  const d = from.y === to.y
    ? `M${from.x} ${from.y} C${from.x} ${from.y - lift} ${to.x} ${to.y - lift} ${to.x} ${to.y}`
    : `M${from.x} ${from.y} C${from.x} ${from.y - 30} ${to.x + 10 * number} ${(from.y + to.y) / 2} ${to.x} ${to.y}`;
  shape("path", { d, ...look });
  shape("circle", { cx: to.x, cy: to.y, r: 1.5 + 1.5 * share, fill: color });
}

function band(rows) {
  const begins = [...rows].sort((one, two) => one[0] - two[0]);
  let covered = 0;
  spans.forEach((span, at) => {
    while (begins.length && begins[0][0] <= data.begin + at) covered += begins.shift()[1];
    if (data.begin + at > chosen || covered < 0.01) return;
    const mark = element("span", "", { class: "band", "aria-hidden": "true" });
    mark.style.setProperty("--c", `var(--series-${series.box})`);
    mark.style.opacity = 0.1 + 0.9 * covered;
    span.append(mark);
  });
}

function draw() {
  const at = chosen - data.begin;
  by("arcs").replaceChildren();
  document.querySelectorAll(".band").forEach((mark) => mark.remove());
  by("arcs").setAttribute("width", by("tokens").offsetLeft + by("tokens").offsetWidth);
  by("arcs").setAttribute("height", by("tokens").offsetTop + by("tokens").offsetHeight);
  const heads = shown();
  let number = 0;
  for (const [name, kind] of gather(heads, at)) {
    const color = `var(--series-${series[name]})`;
    if (name === "box") { band(kind.rows); continue; }
    for (const [row, share] of kind.rows) if (share >= 0.01) arc(place(chosen), place(row), color, share, number);
    for (const row of kind.anchors) {
      const { x, y } = place(row);
      shape("path", { d: `M${x} ${y - 5.5} l5 5 l-5 5 l-5 -5 z`, fill: "var(--card)", stroke: color, "stroke-width": 2 });
    }
    number += 1;
  }
  tell(heads, at);
}

function reads(head, at) {
  const cell = element("td");
  const rows = head.rows[at];
  if (!rows.length) {
    cell.append(element("span", "no such row: what it looks for has not occurred before", { class: "quiet" }));
  } else if (head.kind === "box") {
    const lengths = rows.flatMap(([row, share]) => Array(Math.round(10 * share)).fill(chosen - row + 1)).reverse();
    cell.append(`windows of ${lengths[0].toLocaleString("en")} to ${lengths.at(-1).toLocaleString("en")} tokens, half of them `
      + `up to ${lengths[Math.ceil(lengths.length / 2) - 1].toLocaleString("en")}`);
  } else {
    const best = [...rows].sort((one, two) => two[1] - one[1]).slice(0, 4);
    best.forEach(([row, share], number) => {
      const back = row === chosen ? "itself" : (chosen - row).toLocaleString("en") + " back";
      cell.append(number ? "; " : "", element("code", data.texts[row]), ` ${back}, ${percent(share)}`);
    });
    if (rows.length > best.length) cell.append(`; ${rows.length - best.length} more`);
    if (head.kind !== "now") cell.append(element("span", ` (measured from row ${head.origins[at].toLocaleString("en")})`, { class: "quiet" }));
  }
  return cell;
}

function tell(heads, at) {
  const missing = new Set(heads.filter((head) => !head.rows[at].length).map((head) => head.kind));
  by("says").replaceChildren("Token " + chosen.toLocaleString("en") + " ", element("code", data.texts[chosen]), ": "
    + (missing.size ? `no such row for ${[...missing].join(", ")} heads.` : "every head shown reads something."));
  const streams = document.querySelector(".reads thead").textContent.includes("Stream");
  by("reads").replaceChildren(...heads.map((head) => {
    const row = element("tr");
    const kind = element("td", "", { class: "kind" });
    const mark = element("span", "", { class: "dot" });
    mark.style.setProperty("--c", `var(--series-${series[head.kind]})`);
    kind.append(mark, head.kind);
    row.append(element("td", head.layer + 1), element("td", head.head + 1), kind);
    if (streams) row.append(element("td", head.stream));
    row.append(reads(head, at));
    return row;
  }));
}

function choose(token, scroll) {
  spans[chosen - data.begin].setAttribute("aria-selected", "false");
  chosen = Math.min(Math.max(token, data.begin), data.begin + spans.length - 1);
  const span = spans[chosen - data.begin];
  span.setAttribute("aria-selected", "true");
  by("tokens").setAttribute("aria-activedescendant", span.id);
  if (scroll) {
    // Not scrollIntoView: the page around the text must not move.
    const [top, bottom] = [span.offsetTop - 60, span.offsetTop + span.offsetHeight + 20];
    if (top < stage.scrollTop) stage.scrollTop = top;
    if (bottom > stage.scrollTop + stage.clientHeight) stage.scrollTop = bottom - stage.clientHeight;
  }
  draw();
}

// The token in the line above or below that lies nearest.
function vertical(step) {
  const here = spans[chosen - data.begin];
  const middle = (span) => span.offsetLeft + span.offsetWidth / 2;
  const tops = [...new Set(spans.map((span) => span.offsetTop))];
  const top = tops[tops.indexOf(here.offsetTop) + step];
  if (top === undefined) return chosen;
  const line = spans.filter((span) => span.offsetTop === top);
  const nearest = line.reduce((one, two) => (Math.abs(middle(two) - middle(here)) < Math.abs(middle(one) - middle(here)) ? two : one));
  return data.begin + spans.indexOf(nearest);
}

by("tokens").addEventListener("click", (event) => {
  const at = spans.indexOf(event.target.closest("[role=option]"));
  if (at >= 0) choose(data.begin + at);
});
by("tokens").addEventListener("keydown", (event) => {
  const moves = { ArrowLeft: () => chosen - 1, ArrowRight: () => chosen + 1, ArrowUp: () => vertical(-1), ArrowDown: () => vertical(1),
    Home: () => data.begin, End: () => data.begin + spans.length - 1 };
  if (!moves[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  choose(moves[event.key](), true);
});
document.querySelector(".controls").addEventListener("change", draw);
new ResizeObserver(draw).observe(by("tokens"));
choose(chosen, true);
