// Draws what the server says. Every text goes in as text: nothing of it is read as a page.
"use strict";

const HOUR = 3600;
// Told apart without colour, too: by their dashes.
const STROKES = [["#0969da", ""], ["#bc4c00", "8 4"], ["#8250df", "2 4"], ["#1a7f37", "12 4 2 4"], ["#bf3989", "6 2"]];
let history = [];

const element = (id) => document.getElementById(id);
const percent = (share) => (share === null || share === undefined ? "–" : `${share >= 0 ? "+" : ""}${(share * 100).toFixed(1)} %`);
const round = (number) => (typeof number === "number" ? Math.round(number).toString() : "–");

function made(name, text, attributes = {}) {
  const drawn = ["svg", "rect", "line", "polyline"].includes(name);
  const node = drawn ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  if (text !== undefined) node.textContent = text;
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
}

function rows(table, list) {
  table.querySelector("tbody").replaceChildren(...list.map((cells) => {
    const row = made("tr");
    row.append(...cells.map((cell, at) => {
      if (cell instanceof Node) { const td = made("td"); td.append(cell); return td; }
      return at === 0 ? made("th", cell, { scope: "row" }) : made("td", cell, typeof cell === "number" || /^[+-]?[\d.]+( %)?$/.test(cell) ? { class: "number" } : {});
    }));
    return row;
  }));
}

function span(seconds) {
  if (seconds === null || seconds === undefined) return "";
  if (seconds < 120) return `${Math.round(seconds)} s`;
  return seconds < 7200 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
}

function bar(load, status, largest) {
  const svg = made("svg", undefined, { class: "bar", viewBox: "0 0 1000 20", preserveAspectRatio: "none", "aria-hidden": "true" });
  const at = (value) => (1000 * value) / largest;
  // Without a trigger there is no band yet.
  const edges = typeof status.trigger === "number" ? [1 - status.trigger, 1 + status.trigger].map((share) => status.mean * share) : [];
  if (load > edges[1]) svg.classList.add("above");
  svg.append(made("rect", undefined, { x: 0, y: 3, width: at(load), height: 14 }));
  for (const [value, kind] of [[status.mean, "mean"], ...edges.map((edge) => [edge, "edge"])]) {
    svg.append(made("line", undefined, { x1: at(value), x2: at(value), y1: 0, y2: 20, class: kind }));
  }
  return svg;
}

function shown(figures) {
  const status = figures.status;
  element("fault").hidden = !figures.fault;
  element("fault").textContent = figures.fault ? `These are old figures: ${figures.fault}` : "";
  if (!status) return;
  element("node").textContent = status.node;
  document.title = `rebalancer ${status.node}`;
  element("line").textContent = `${status.mode}${status.paused ? ", PAUSED" : ""} · source ${status.source} · shim ${status.shim} · release ${status.version}`;
  element("now").textContent = status.hold ? `Hold${status.hold_since_s ? ` for ${span(status.hold_since_s)}` : ""}: ${status.hold.message}` : "A plan would start now.";
  element("warnings").replaceChildren(...status.warnings.map((warning) => made("li", warning)));
  const largest = Math.max(1, status.mean * 1.2, ...status.view.map((one) => one.load));
  rows(element("load"), status.view.map((one) => [
    one.apiserver, one.state, round(one.load), percent(status.mean > 0 ? one.load / status.mean - 1 : null), round(one.draining), bar(one.load, status, largest),
  ]));
  rows(element("peers"), status.peers.map((peer) => [peer.apiserver, peer.fault || "it answers"]));
  const came = status.outcomes || {};
  element("totals").textContent = `Since the agent's start ${status.goaways_total} were told to go: ${came.moved ?? 0} moved, ${came.returned ?? 0} returned, ${came.lost ?? 0} out of sight.`;
  decisions(figures.decisions);
  clients(figures.connections);
}

function decisions(list) {
  const open = new Set([...document.querySelectorAll("#decisions details[open]")].map((one) => one.dataset.id));
  element("decisions").replaceChildren(...list.slice().reverse().map((decision) => {
    const details = made("details", undefined, { "data-id": decision.id });
    details.open = open.has(String(decision.id));
    const what = decision.hold ? decision.hold.message : `${decision.victims} told to go`;
    const summary = made("summary");
    summary.append(made("time", new Date(decision.at).toLocaleTimeString(), { datetime: decision.at }), ` #${decision.id} · skew ${percent(decision.skew)} · ${what}`);
    const derivation = made("dl");
    for (const [name, value] of Object.entries(decision.numbers)) derivation.append(made("dt", name), made("dd", value));
    details.append(summary, derivation);
    const item = made("li");
    item.append(details);
    return item;
  }));
}

function clients(list) {
  element("clients").hidden = !list;
  if (!list) return;
  rows(element("clients"), list.map((one) => [one.client, one.user || "–", one.protocol, one.state, round(one.requests), round(one.open_watches)]));
}

function draw() {
  const svg = element("hour");
  if (history.length < 2) { element("hour-text").textContent = "It is drawn from when this page's server was started."; return; }
  const end = history[history.length - 1].t;
  const names = [...new Set(history.flatMap((point) => Object.keys(point.loads)))].sort();
  const largest = Math.max(1, ...history.flatMap((point) => Object.values(point.loads)));
  svg.replaceChildren(...names.map((name, at) => {
    const points = history.filter((point) => name in point.loads)
      .map((point) => `${(1000 * (1 - (end - point.t) / HOUR)).toFixed(1)},${(210 - (200 * point.loads[name]) / largest).toFixed(1)}`);
    const [color, dashes] = STROKES[at % STROKES.length];
    return made("polyline", undefined, { points: points.join(" "), stroke: color, "stroke-dasharray": dashes });
  }));
  const last = history[history.length - 1].loads;
  element("hour-text").textContent = `Load from 0 to ${round(largest)}; now ${names.map((name) => `${name} ${round(last[name])}`).join(", ")}.`;
}

function take(figures) {
  if (figures.history) history = figures.history;
  if (figures.point) history = history.filter((point) => point.t > figures.point.t - HOUR && point.t < figures.point.t).concat(figures.point);
  shown(figures);
  draw();
}

fetch("figures.json").then((answer) => answer.json()).then(take).finally(() => {
  const source = new EventSource("events");
  source.onmessage = (event) => take(JSON.parse(event.data));
  source.onerror = () => { element("fault").hidden = false; element("fault").textContent = "These are old figures: the page's server does not answer."; };
});
