// The view of the cluster: nodes and links each second, and one step on demand.

import { ask, element } from "./app.js";

const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const HISTORY = 120;
const curve = [];
let timer = 0;

export function showCluster(visible) {
  clearTimeout(timer);
  if (visible) refresh();
}

async function refresh() {
  clearTimeout(timer);
  try {
    if (!document.hidden) show(await (await ask("cluster")).json());
    $("trouble").hidden = true;
  } catch (error) {
    $("trouble").hidden = false;
    $("trouble").textContent = error.message;
  }
  clearTimeout(timer);
  if (!$("cluster").hidden) timer = setTimeout(refresh, 1000);
}

function count(value) {
  if (value === null || value === undefined) return "–";
  return value >= 10 || Number.isInteger(value) ? Math.round(value).toLocaleString("en") : value.toFixed(1);
}

function percent(part) {
  return part === null || part === undefined ? "–" : `${Math.round(part * 100)} %`;
}

function show(cluster) {
  $("tokens").textContent = count(cluster.tokens_per_s);
  $("running").textContent = count(cluster.requests.running);
  $("waiting").textContent = count(cluster.requests.waiting);
  $("prefill").textContent = count(cluster.prompt_tokens_per_s);
  $("preempted").textContent = count(cluster.requests.preemptions);
  curve.push(cluster.tokens_per_s ?? 0);
  if (curve.length > HISTORY) curve.shift();
  drawCurve();
  $("nodes").replaceChildren(...cluster.nodes.map(card));
  const order = new Map(cluster.nodes.map((node, i) => [node.name, i]));
  const rows = [];
  for (const [i, node] of cluster.nodes.entries()) {
    if (node.role !== "compute") continue;
    for (const link of node.links ?? []) {
      const peer = order.get(link.peer);
      if (cluster.nodes[peer]?.role === "compute" && peer < i) continue; // its other end is listed already
      rows.push(row(node.name, link));
    }
  }
  $("links").tBodies[0].replaceChildren(...rows);
}

function card(node) {
  const made = element("div", "node");
  const title = element("div", "title");
  title.append(element("i", `dot ${node.state}`), element("b", "", node.name), element("span", "role", node.role));
  made.append(title, element("div", "state", node.text));
  if (node.state === "away") return made;
  made.append(meter("busy", node.busy, percent(node.busy)));
  if (node.kv_tokens_total) {
    const part = node.kv_tokens_used / node.kv_tokens_total;
    const kv = meter("KV", part, percent(part));
    kv.classList.add("kv");
    kv.title = `${count(node.kv_tokens_used)} of ${count(node.kv_tokens_total)} tokens, ${count(node.sequences)} sequences`;
    made.append(kv);
  }
  return made;
}

function meter(name, part, value) {
  const made = element("div", "meter");
  const track = element("div", "track");
  const fill = element("div", "fill");
  fill.style.width = `${Math.min(1, part ?? 0) * 100}%`;
  track.append(fill);
  made.append(element("span", "", name), track, element("span", "value", value));
  return made;
}

function row(name, link) {
  const made = element("tr");
  const speed = (bytes) => (bytes === undefined ? "–" : (bytes / 1e6).toFixed(2));
  const cells = [`${name} – ${link.peer}`, link.transport, speed(link.sent), speed(link.received), percent(link.waited)];
  made.append(...cells.map((text) => element("td", "", text)));
  return made;
}

function shape(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function drawCurve() {
  const highest = Math.max(...curve, 1);
  const points = curve.map((value, i) => [600 - (curve.length - 1 - i) * (600 / (HISTORY - 1)), 86 - (value / highest) * 80]);
  const line = points.map((point) => point.map((x) => x.toFixed(1)).join(",")).join(" ");
  const area = `${points[0][0].toFixed(1)},90 ${line} 600,90`;
  $("curve").replaceChildren(shape("polygon", { class: "area", points: area }), shape("polyline", { class: "line", points: line }));
  $("peak").textContent = `two minutes, ${count(highest)} at most`;
}

// -- one step

const COLOURS = new Map([
  ["head", 1], ["tail", 2], ["sample", 3], ["begin", 4], ["plan", 4], ["past", 5], ["finish", 7],
]);

$("record").addEventListener("click", async () => {
  const button = $("record");
  button.disabled = true;
  $("step-text").textContent = "Recording half a second …";
  try {
    drawStep(await (await ask("cluster/timeline", { body: {} })).json());
  } catch (error) {
    $("step-text").textContent = error.message;
  }
  button.disabled = false;
});

function drawStep(step) {
  if (!step.nodes) {
    $("step-text").textContent = "No decode step ran in that half second. Press Record while requests are running.";
    return;
  }
  const whole = Math.max(step.duration_us, 1);
  const requests = step.requests === 1 ? "1 request" : `${step.requests} requests`;
  $("step-text").textContent =
    `Step ${step.step} of batch ${step.batch}, ${requests}: ${time(whole)}. Pale: other steps meanwhile.`;
  const names = new Set();
  const lanes = step.nodes.map((node) => {
    const made = element("div", "lane");
    const picture = shape("svg", { viewBox: `0 0 ${whole} 26`, preserveAspectRatio: "none" });
    for (const span of node.spans) {
      if (!span.other) names.add(span.name);
      const kind = `k${COLOURS.get(span.name) ?? 6}${span.other ? " other" : ""}`;
      const box = { class: kind, x: span.start_us, y: 3, width: Math.max(span.duration_us, whole / 1500), height: 20 };
      const drawn = shape("rect", box);
      const title = document.createElementNS(SVG, "title");
      const layer = span.layer >= 0 ? `, layer ${span.layer}` : "";
      title.textContent = `${span.name}${layer}: ${time(span.duration_us)}`;
      drawn.append(title);
      picture.append(drawn);
    }
    made.append(element("span", "", node.name), picture);
    return made;
  });
  const axis = element("div", "axis");
  axis.append(...[0, 0.25, 0.5, 0.75, 1].map((part) => element("span", "", time(part * whole))));
  $("step").replaceChildren(...lanes, axis);
  $("legend").replaceChildren(
    ...[...names].map((name) => {
      const made = element("span");
      made.append(element("i", `k${COLOURS.get(name) ?? 6}`), name.replaceAll("_", " "));
      return made;
    }),
  );
}

function time(microseconds) {
  if (!microseconds) return "0";
  return microseconds >= 1000 ? `${(microseconds / 1000).toFixed(2)} ms` : `${Math.round(microseconds)} µs`;
}
