// Plays the path of one token: the collective at each location, its links, and the bytes a device has sent so far.
let phase = "decode", path = [], at = 0, timer = null;
const calm = matchMedia("(prefers-reduced-motion: reduce)");
const verbs = {
  embedding: "Embedding", attention: "Attention", mlp: "MLP", dispatch: "Dispatch to experts", experts: "Experts",
  combine: "Combine",
  "shared expert": "Shared expert", "between stages": "To the next stage",
  "from the last stage": "From the last stage to all",
  "sampled rows": "Sampled rows", head: "Head",
};

function setPhase(name) {
  phase = name;
  path = tokenPath(phase);
  at = 0;
  byId("position").max = path.length - 1;
  for (const button of byId("phases").children) button.setAttribute("aria-pressed", button.dataset.phase === phase);
  drawTrack();
  drawToggles();
  color();
  choose(chosen);
  showStep();
}
function go(to, announce = true) {
  at = Math.max(0, Math.min(path.length - 1, to));
  if (at === path.length - 1) pause();
  showEvent(announce);
}
function play() {
  if (at === path.length - 1) at = -1;
  byId("play").textContent = "Pause";
  byId("play").setAttribute("aria-label", "Pause");
  const tick = () => {
    go(at + 1, false);
    if (timer !== null) timer = setTimeout(tick, (calm.matches ? 1200 : 600) / byId("speed").value);
  };
  timer = 0;
  tick();
}
function pause() {
  clearTimeout(timer);
  const wasPlaying = timer !== null;
  timer = null;
  byId("play").textContent = "Play";
  byId("play").setAttribute("aria-label", "Play");
  if (wasPlaying) byId("event").setAttribute("aria-live", "polite");
}
const playing = () => timer !== null;

// announce: whether a screen reader reads the event. It does not while the path plays.
function showEvent(announce = true) {
  const event = path[at], all = event.op === null ? [] : groups(event), own = all.filter(group => group.includes(chosen));
  byId("event").setAttribute("aria-live", announce ? "polite" : "off");
  byId("position").value = at;
  const of = event.layer === null ? "" : ` of layer ${event.layer}`;
  byId("position").setAttribute("aria-valuetext", `${at + 1} of ${path.length}: ${verbs[event.location]}${of}`);
  light(event, all, own);
  showTrack(event);
  const layer = event.layer === null ? "" : `layer ${event.layer} of ${span([0, data.facts.layers])}`;
  const onward = event.to === null ? "" : ` to ${event.to}`;
  const stage = event.stage === null ? "" : `stage ${event.stage}${onward}`;
  const head = html("b", {}, verbs[event.location]), where = [layer, stage].filter(Boolean).join(", ");
  byId("event").replaceChildren(head, where ? ` · ${where}` : "", html("span", { class: "said" }, ...said(event, own)));
  const sent = path.map(one => sends(one, chosen) ? one.sent : 0), until = sum(sent.slice(0, at + 1));
  const running = html("b", { id: "running", "data-bytes": Math.round(until) }, size(until));
  byId("sent").replaceChildren(`Device ${chosen} has sent `, running, ` of ${size(sum(sent))} on this path.`);
}
function said(event, own) {
  if (event.op === null) return ["computes; no communication"];
  const over = `${event.op} over ${event.axes.join(" × ")}`, group = own[0] || [];
  const result = `${over}: ${size(event.bytes)} on each device`;
  if (!own.length) return [result, `; device ${chosen} does not take part`];
  const mine = flows(event, group).filter(([from]) => from === chosen);
  const far = sum(mine.filter(([, to]) => domainOf(to) !== domainOf(chosen)).map(flow => flow[2]));
  const sent = sum(mine.map(flow => flow[2]));
  const near = fabric.kind === "torus" ? "slice" : "fast fabric";
  const split = numDomains > 1 && sent ? ` (${size(sent - far)} inside its ${near}, ${size(far)} outside)` : "";
  return [result, sent ? `; device ${chosen} sends ${size(sent)}${split}` : `; device ${chosen} sends nothing`];
}
function light(event, all, own) {
  const everyone = loads(event, all), mine = loads(event, own);
  const most = Math.max(1, ...[...everyone.values()].map(([one, other]) => Math.max(one, other)));
  for (const [id, { path: line, title, name }] of drawn.links) {
    const load = everyone.get(id);
    line.classList.toggle("lit", Boolean(load));
    line.classList.toggle("own", mine.has(id));
    line.style.setProperty("--load", load ? (.35 + .65 * Math.max(...load) / most).toFixed(2) : 0);
    title.textContent = load ? `${name}: ${size(Math.max(...load))} one way, ${event.op}` : name;
    load ? line.setAttribute("data-bytes", Math.round(Math.max(...load))) : line.removeAttribute("data-bytes");
  }
  const taking = new Set(all.flat()), together = new Set(own.flat());
  drawn.devices.forEach(({ node }, device) => {
    const computes = event.op === null && (event.stage === null || places[device].pipeline === event.stage);
    node.classList.toggle("lit", taking.has(device) || computes);
    node.classList.toggle("own", together.has(device));
  });
}

// --- the path, drawn as a row of layers ---

const track = { cells: new Map() };
function drawTrack() {
  const layers = data.segments.flatMap(part => visits(part).flatMap(({ stage }, repeat) => range(part.period).map(block =>
    [part.first + repeat * part.period + block, part.moe[block] ? "experts" : "mlp", part.stages > 1 ? stage : null])));
  const stops = [["in", "embedding", null], ...layers, ["out", "head", null]];
  const step = Math.min(40, 1000 / stops.length);
  const root = svg("svg", { viewBox: `0 0 ${step * stops.length} 34`, preserveAspectRatio: "none" });
  root.style.maxWidth = `${step * stops.length * 1.2}px`;
  track.cells.clear();
  stops.forEach(([key, kind, stage], i) => {
    const cell = svg("rect", { class: `cell ${kind}`, x: i * step + .75, y: 6, width: Math.max(1.5, step - 1.5),
      height: 18, rx: 2 });
    const first = path.findIndex(event => key === "in" || (key === "out" ? event.location === "head" : event.layer === key));
    cell.addEventListener("click", () => go(first));
    track.cells.set(key, cell);
    root.append(cell);
    if (stage === null) return;
    root.append(svg("rect", { class: `under ${stage % 2 ? "odd" : ""}`, x: i * step, y: 28, width: step, height: 3 }));
  });
  byId("track").replaceChildren(root);
}
function showTrack(event) {
  const before = path.slice(0, at).findLast(one => one.layer !== null)?.layer;
  const outside = event.location === "embedding" ? "in" : event.stage !== null ? before : "out";
  const here = event.layer !== null ? event.layer : outside;
  const order = [...track.cells.keys()], now = order.indexOf(here);
  order.forEach((key, i) => {
    track.cells.get(key).classList.toggle("now", i === now);
    track.cells.get(key).classList.toggle("done", i < now);
  });
  const same = one => one.layer === event.layer && (event.layer !== null || one === event);
  const list = path.map((one, i) => [one, i]).filter(([one, i]) => same(one) && Math.abs(i - at) < 40);
  byId("places").replaceChildren(...list.map(([one, i]) => html("li", { class: i === at ? "now" : "" },
    verbs[one.location], html("small", {}, one.op ? `${one.op} ${size(one.bytes)}` : "computes"))));
}
