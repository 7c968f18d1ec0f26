// Draws what the server says. Every text goes in as text: nothing of it is read as a page.
// What is there already is changed where it is: who reads it or has put the focus on it stays there.
"use strict";

const HOUR = 3600;
// Lines of the hour that are told apart (page.css).
const LINES = 5;
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

const say = (node, text) => { if (node.textContent !== text) node.textContent = text; };

// A cell of text, or of a drawing.
function put(cell, content, isHead) {
  if (content instanceof Node) {
    if (cell.firstElementChild?.outerHTML !== content.outerHTML) cell.replaceChildren(content);
    return;
  }
  say(cell, content);
  cell.classList.toggle("number", !isHead && /^[+-]?[\d.]+( %)?$/.test(content));
}

function rows(table, list) {
  const body = table.querySelector("tbody");
  while (body.rows.length > list.length) body.deleteRow(-1);
  list.forEach((cells, at) => {
    const row = body.rows[at] ?? body.insertRow();
    cells.forEach((content, column) => {
      if (!row.cells[column]) row.append(column === 0 ? made("th", undefined, { scope: "row" }) : made("td"));
      put(row.cells[column], content, column === 0);
    });
  });
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
  say(element("fault"), figures.fault ? `These are old figures: ${figures.fault}` : "");
  if (!status) return;
  say(element("node"), status.node);
  document.title = `rebalancer ${status.node}`;
  say(element("line"), `${status.mode}${status.paused ? ", PAUSED" : ""} · source ${status.source} · shim ${status.shim} · release ${status.version}`);
  const message = status.hold ? status.hold.message : "a plan would start now";
  say(element("now"), `${status.hold ? `Hold${status.hold_since_s ? ` for ${span(status.hold_since_s)}` : ""}: ` : "No hold: "}${message}`);
  // Said aloud when the reason is another one, and not with each new number.
  const reason = status.hold ? status.hold.reason : "none";
  if (element("said").dataset.reason !== reason) {
    element("said").dataset.reason = reason;
    say(element("said"), status.hold ? `Hold: ${message}` : message);
  }
  element("warnings").replaceChildren(...status.warnings.map((warning) => made("li", warning)));
  const largest = Math.max(1, status.mean * 1.2, ...status.view.map((one) => one.load));
  rows(element("load"), status.view.map((one) => [
    one.apiserver, one.state, round(one.load), percent(status.mean > 0 ? one.load / status.mean - 1 : null), round(one.draining), bar(one.load, status, largest),
  ]));
  rows(element("peers"), status.peers.map((peer) => [peer.apiserver, peer.fault || "it answers"]));
  const came = status.outcomes || {};
  say(element("totals"), `Since the agent's start ${status.goaways_total} were told to go: ${came.moved ?? 0} moved, ${came.returned ?? 0} returned, ${came.lost ?? 0} out of sight.`);
  decisions(figures.decisions);
  clients(figures.connections);
}

function decisions(list) {
  const there = new Map([...element("decisions").children].map((item) => [item.dataset.id, item]));
  list.slice().reverse().forEach((decision, at) => {
    const id = String(decision.id);
    const item = there.get(id) ?? blank(decision);
    there.delete(id);
    // What is in its place already is not taken out: it would lose the focus.
    const other = element("decisions").children[at];
    if (other !== item) element("decisions").insertBefore(item, other ?? null);
    const what = decision.hold ? decision.hold.message : `skew ${percent(decision.skew)}, ${decision.victims} told to go`;
    say(item.querySelector("summary span"), ` #${id} · ${what}`);
    const numbers = item.querySelector("dl");
    const known = new Map([...numbers.querySelectorAll("dt")].map((dt) => [dt.textContent, dt.nextElementSibling]));
    for (const [name, value] of Object.entries(decision.numbers)) {
      if (known.has(name)) say(known.get(name), value);
      else numbers.append(made("dt", name), made("dd", value));
    }
  });
  for (const old of there.values()) old.remove();
}

function blank(decision) {
  const item = made("li", undefined, { "data-id": decision.id });
  const details = made("details");
  const summary = made("summary");
  summary.append(made("time", new Date(decision.at).toLocaleTimeString(), { datetime: decision.at }), made("span"));
  details.append(summary, made("dl"));
  item.append(details);
  return item;
}

function clients(list) {
  element("clients").hidden = !list;
  if (!list) return;
  rows(element("clients"), list.map((one) => [one.client, one.user || "–", one.protocol, one.state, round(one.requests), round(one.open_watches)]));
}

function draw() {
  const svg = element("hour");
  if (history.length < 2) { say(element("hour-text"), "It is drawn from when this page's server was started."); return; }
  const end = history[history.length - 1].t;
  const names = [...new Set(history.flatMap((point) => Object.keys(point.loads)))].sort();
  const largest = Math.max(1, ...history.flatMap((point) => Object.values(point.loads)));
  const quarters = [250, 500, 750].map((x) => made("line", undefined, { x1: x, x2: x, y1: 0, y2: 220 }));
  svg.replaceChildren(...quarters, ...names.map((name, at) => {
    const points = history.filter((point) => name in point.loads)
      .map((point) => `${(1000 * (1 - (end - point.t) / HOUR)).toFixed(1)},${(210 - (200 * point.loads[name]) / largest).toFixed(1)}`);
    return made("polyline", undefined, { points: points.join(" "), class: `s${at % LINES}` });
  }));
  element("legend").replaceChildren(...names.map((name, at) => {
    const sample = made("svg", undefined, { viewBox: "0 0 40 10" });
    sample.append(made("line", undefined, { x1: 0, x2: 40, y1: 5, y2: 5, class: `s${at % LINES}` }));
    const item = made("li");
    item.append(sample, name);
    return item;
  }));
  const last = history[history.length - 1].loads;
  say(element("hour-text"), `Load from 0 to ${round(largest)}; now ${names.map((name) => `${name} ${round(last[name])}`).join(", ")}.`);
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
  source.onerror = () => { element("fault").hidden = false; say(element("fault"), "These are old figures: the page's server does not answer."); };
});
