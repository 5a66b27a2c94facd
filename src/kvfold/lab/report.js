"use strict";

// Tables: a heading sorts, twice turns the order round; what was not measured stays last.
for (const table of document.querySelectorAll("table.results")) {
  const body = table.tBodies[0];
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, at) => heading.querySelector("button").addEventListener("click", () => {
    const down = heading.getAttribute("aria-sort") === "ascending";
    headings.forEach(other => other.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", down ? "descending" : "ascending");
    const number = heading.classList.contains("number");
    const value = row => row.cells[at].dataset.sort;
    const rows = [...body.rows].sort((a, b) => {
      const x = value(a), y = value(b);
      if (x === "" || y === "") return (x === "") - (y === "");
      return (down ? -1 : 1) * (number ? x - y : x.localeCompare(y));
    });
    body.append(...rows);
  }));
}

// Figures.
const charts = [...document.querySelectorAll("script[data-for]")].map(script => ({
  place: document.getElementById(script.dataset.for), figure: JSON.parse(script.textContent)}));
const PAPER_WIDTH = 680;
let printing = false;

const plain = text => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;");
// Breaks a line where it would be wider than the figure.
function wrapped(text, width) {
  const lines = [""];
  for (const word of text.split(" ")) {
    if (lines.at(-1) && lines.at(-1).length + word.length > width / 7.5) lines.push("");
    lines.push(`${lines.pop()} ${word}`.trim());
  }
  return lines.map(plain).join("<br>");
}
const shortened = (text, longest) => text.length > longest ? text.slice(0, longest - 1) + "…" : text;

function layoutOf(figure, traces, width) {
  const style = getComputedStyle(document.documentElement);
  const color = name => printing ? {"--ink": "#000", "--line": "#ccc", "--paper": "#fff"}[name] : style.getPropertyValue(name).trim();
  const layout = structuredClone(figure.layout);
  layout.width = width;
  layout.font = {color: color("--ink"), size: 12, family: "system-ui, sans-serif"};
  layout.hoverlabel = {bgcolor: color("--paper"), font: {color: color("--ink")}};
  for (const axis of [layout.xaxis, layout.yaxis]) {
    axis.gridcolor = axis.zerolinecolor = color("--line");
    axis.fixedrange = true;
  }
  layout.xaxis.title.text = wrapped(layout.xaxis.title.text, 0.8 * width);
  for (const shape of layout.shapes ?? []) shape.line.color = color("--ink");
  const names = [...new Set(traces.filter(trace => trace.meta).map(trace => trace.meta.strategy))];
  if (figure.form === "lines" || figure.form === "points") {
    layout.height = figure.form === "lines" ? Math.max(400, 90 + 13 * names.length) : Math.max(400, Math.min(560, width));
    if (figure.form === "lines") layout.margin.r = Math.min(170, 0.36 * width);
  } else {
    layout.height = 80 + 21 * names.length;
    Object.assign(layout.yaxis, {categoryorder: "array", categoryarray: names, tickvals: names, tickfont: {size: 11},
      autorange: false, range: [names.length - 0.4, -0.6], ticktext: names.map(name => plain(shortened(name, Math.max(14, Math.floor(width / 26)))))});
  }
  return layout;
}

// Places `step` apart in [top, bottom], near those wanted, which ascend; crowds share their middle.
function spread(wanted, step, top, bottom) {
  const groups = [];
  const start = group => Math.min(Math.max(top, group.reduce((a, b) => a + b, 0) / group.length), bottom - step * (group.length - 1));
  for (const want of wanted) {
    groups.push([want]);
    while (groups.length > 1 && start(groups.at(-2)) + step * groups.at(-2).length > start(groups.at(-1))) {
      const last = groups.pop(), before = groups.at(-1);
      before.push(...last.map(w => w - step * before.length));
    }
  }
  return groups.flatMap(group => group.map((_, i) => start(group) + step * i));
}

// Names at the right ends of lines, each with a thread to its line.
function endLabels(place, traces) {
  const {xaxis, yaxis, width} = place._fullLayout;
  const ends = traces.map(t => ({name: t.meta.strategy, color: t.line.color, x: xaxis.d2p(t.x.at(-1)), y: yaxis.d2p(t.y.at(-1))}));
  ends.sort((a, b) => a.y - b.y);
  const heights = spread(ends.map(end => end.y), 13, 6, yaxis._length - 6);
  const longest = Math.floor(Math.min(170, 0.36 * width) / 6.2) - 3;
  return ends.map((end, i) => ({
    xref: "paper", yref: "paper", x: end.x / xaxis._length, y: 1 - end.y / yaxis._length,
    ax: xaxis._length - end.x + 14, ay: heights[i] - end.y, xanchor: "left", text: plain(shortened(end.name, longest)),
    showarrow: true, arrowhead: 0, arrowwidth: 0.6, arrowcolor: "#aaa", standoff: 4, font: {size: 11, color: end.color},
  }));
}

// Names beside points: each at the first of several places that nothing else covers; where there is none, the pointer shows it.
function pointLabels(place, traces) {
  const {xaxis, yaxis} = place._fullLayout;
  const points = traces.filter(t => t.meta).map(t => ({name: t.meta.strategy, color: t.marker.color, x: xaxis.d2p(t.x[0]), y: yaxis.d2p(t.y[0])}));
  const taken = points.map(({x, y}) => [x - 5, y - 5, x + 5, y + 5]);
  const inside = ([l, t, r, b]) => l >= 0 && t >= 0 && r <= xaxis._length + 8 && b <= yaxis._length;
  const free = box => inside(box) && !taken.some(o => box[0] < o[2] && o[0] < box[2] && box[1] < o[3] && o[1] < box[3]);
  const labels = [];
  for (const {name, color, x, y} of points) {
    const text = shortened(name, 26), w = 6.1 * text.length + 4, h = 13;
    const places = [1, 2, 3].flatMap(far => [[8 * far, 0, 0, .5], [-8 * far, 0, 1, .5], [0, -8 * far, .5, 1], [0, 8 * far, .5, 0],
      [6 * far, -6 * far, 0, 1], [6 * far, 6 * far, 0, 0], [-6 * far, -6 * far, 1, 1], [-6 * far, 6 * far, 1, 0]]);
    for (const [dx, dy, ax, ay] of places) {
      const left = x + dx - ax * w, top = y + dy - ay * h, box = [left, top, left + w, top + h];
      if (!free(box)) continue;
      taken.push(box);
      labels.push({xref: "paper", yref: "paper", x: (left + w / 2) / xaxis._length, y: 1 - (top + h / 2) / yaxis._length,
        xanchor: "center", yanchor: "middle", text: plain(text), showarrow: false, font: {size: 11, color}, bgcolor: place._fullLayout.hoverlabel.bgcolor, borderpad: 0});
      break;
    }
  }
  return labels;
}

async function draw({place, figure}) {
  const traces = figure.data.filter(trace => !trace.meta || shows(trace.meta.strategy, trace.meta.changes));
  const width = printing ? PAPER_WIDTH : place.clientWidth;
  if (!width) return;
  await Plotly.react(place, traces, layoutOf(figure, traces, width), {displayModeBar: false});
  const label = {lines: endLabels, points: pointLabels}[figure.form];
  if (label) await Plotly.relayout(place, {annotations: label(place, traces)});
}

let drawing = Promise.resolve();
function drawAll() {
  drawing = drawing.then(async () => { for (const chart of charts) await draw(chart); });
  return drawing;
}

// The filter: text in a strategy's name or plan, and what it changes.
const field = document.getElementById("filter");
const buttons = [...document.querySelectorAll(".filter button")];
const marked = [...document.querySelectorAll("[data-strategy]")];
const plans = new Map(marked.filter(e => e.dataset.plan).map(e => [e.dataset.strategy, e.dataset.plan]));
const strategies = new Set(marked.map(e => e.dataset.strategy));

function shows(strategy, changes) {
  const text = `${strategy} ${plans.get(strategy) ?? ""}`.toLowerCase();
  const off = buttons.some(b => b.dataset.changes === changes && b.getAttribute("aria-pressed") === "false");
  return !off && field.value.toLowerCase().split(/\s+/).every(word => text.includes(word));
}

function applyFilter() {
  const shown = new Set();
  for (const element of marked) {
    element.hidden = !shows(element.dataset.strategy, element.dataset.changes);
    if (!element.hidden) shown.add(element.dataset.strategy);
  }
  document.getElementById("shown").textContent =
    shown.size === strategies.size ? `${shown.size} strategies` : `${shown.size} of ${strategies.size} strategies`;
  return drawAll();
}

field.addEventListener("input", applyFilter);
for (const button of buttons) button.addEventListener("click", () => {
  button.setAttribute("aria-pressed", button.getAttribute("aria-pressed") === "true" ? "false" : "true");
  applyFilter();
});

let known = innerWidth;
addEventListener("resize", () => { if (innerWidth !== known) { known = innerWidth; drawAll(); } });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
// A browser that prints does not wait for promises: what plotly draws at once is enough, labels were placed for the screen's shape.
addEventListener("beforeprint", () => { printing = true; drawAll(); });
addEventListener("afterprint", () => { printing = false; drawAll(); });
drawAll().then(() => { document.documentElement.dataset.drawn = charts.length; });
