// Draws the mesh: selectable devices, links, and colors by mesh coordinate.
const byId = id => document.getElementById(id);
const svgNS = "http://www.w3.org/2000/svg";
function svg(name, attributes = {}, ...children) {
  const node = document.createElementNS(svgNS, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}
function html(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}
function command(text) {  // a line to copy: focus or one click selects all of it
  const code = html("code", { tabindex: 0, "aria-label": `command: ${text}` }, text);
  code.addEventListener("focus", () => getSelection().selectAllChildren(code));
  return code;
}
const worded = (name, attributes, text) => svg(name, attributes, String(text));
const count = n => Math.round(n).toLocaleString("en");
function size(bytes) {
  for (const unit of ["B", "KiB", "MiB", "GiB"]) {
    const digits = unit === "B" || bytes >= 99.95 ? 0 : bytes < 9.995 ? 2 : 1;
    if (bytes < 1024 || unit === "GiB") return `${unit === "B" ? count(bytes) : bytes.toFixed(digits)} ${unit}`;
    bytes /= 1024;
  }
}
const span = ([start, stop]) => stop - start === 1 ? `${start}` : `${start}–${stop - 1}`;
function spans(numbers) {  // [0, 1, 2, 5] -> "0–2, 5"
  const runs = [];
  for (const n of numbers) runs.length && runs.at(-1)[1] === n - 1 ? runs.at(-1)[1] = n : runs.push([n, n]);
  return runs.map(([a, b]) => a === b ? `${a}` : `${a}–${b}`).join(", ");
}

const chosenAxes = new Set();
let chosen = 0;
const drawn = { devices: [], links: new Map() };

function drawMesh() {
  const room = numDomains > 8 ? 1380 : 980;  // draw many nodes smaller, so that all are visible at once
  const figure = geometry(Math.max(500, Math.min(room, (byId("figure").clientWidth || 900) * room / 900)));
  const root = svg("svg", { viewBox: `-2 -2 ${figure.width + 4} ${figure.height + 4}`, role: "listbox",
    "aria-label": `${numDevices} devices` });
  root.style.maxWidth = `${figure.width * 1.15}px`;
  for (const box of figure.boxes) root.append(
    svg("rect", { class: "box", x: box.x, y: box.y, width: box.width, height: box.height, rx: 8 }),
    worded("text", { class: "name", x: box.x + 14, y: box.y + 18 }, box.name));
  if (figure.round) drawHosts(root, figure);
  for (const link of figure.links) {
    const title = worded("title", {}, link.name);
    const path = svg("path", { class: `link ${link.kind}`, d: link.d, "data-link": link.id }, title);
    drawn.links.set(link.id, { path, title, name: link.name, kind: link.kind });
    root.append(path);
  }
  figure.devices.forEach(({ x, y }, device) => root.append(drawDevice(device, x, y, figure.round)));
  drawn.at = figure.devices;
  byId("figure").replaceChildren(root);
  root.addEventListener("keydown", moveByKey);
}
function drawHosts(root, figure) {  // a shade behind the devices of each host, if fabrics are larger than hosts
  if (fabric.node === fabric.domain || fabric.node < 2) return;
  for (const node of range(Math.ceil(numDevices / fabric.node))) {
    const points = figure.devices.slice(node * fabric.node, (node + 1) * fabric.node).map(({ x, y }) => `${x} ${y}`);
    const shade = svg("path", { class: "host", d: `M${points.join(" L")}` }, worded("title", {}, `host ${node}`));
    root.append(shade);
  }
}
function drawDevice(device, x, y, round) {
  const half = round ? 13 : TILE / 2, text = (cls, dy) => svg("text", { class: cls, y: dy });
  const parts = { index: text("index", round ? 3.5 : 0), place: text("place", 13) };
  parts.index.textContent = device;
  const node = svg("g", { class: `device${round ? " round" : ""}`, role: "option", tabindex: -1,
      transform: `translate(${x} ${y})`, "data-device": device },
    svg("rect", { x: -half, y: -half, width: 2 * half, height: 2 * half, rx: round ? half : 7 }),
    parts.index, ...round ? [] : [parts.place]);
  node.addEventListener("focus", () => choose(device));
  node.addEventListener("click", () => node.focus());
  node.addEventListener("mouseenter", () => showDevice(device));
  node.addEventListener("mouseleave", () => showDevice(chosen));
  drawn.devices[device] = { node, ...parts };
  return node;
}

function choose(device) {
  chosen = device;
  drawn.devices.forEach(({ node }, one) => {
    node.setAttribute("tabindex", one === device ? 0 : -1);
    node.setAttribute("aria-selected", one === device);
  });
  showDevice(device);
  showEvent(false);
}
// Moves to the nearest device in the direction of an arrow key; devices straight ahead are preferred.
function moveByKey(event) {
  const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  const end = { Home: 0, End: numDevices - 1 }[event.key];
  if (!way && end === undefined) return;
  event.preventDefault();
  const here = drawn.at[chosen];
  let best = end, least = Infinity;
  if (way) drawn.at.forEach((there, device) => {
    const dx = there.x - here.x, dy = there.y - here.y;
    const ahead = dx * way[0] + dy * way[1], aside = Math.abs(dx * way[1]) + Math.abs(dy * way[0]);
    if (ahead > 1 && ahead + 3 * aside < least) { least = ahead + 3 * aside; best = device; }
  });
  if (best !== undefined) drawn.devices[best].node.focus();
}

// --- colors ---

const tokenShardAxes = () => [...new Set([...data.pages.context_axes, ...data.steps[phase].token_shard_axes])]
  .filter(axis => data.mesh[axis] > 1);
const unshared = "this layout has neither sequence nor context parallelism on this mesh";
function drawToggles() {
  const names = ["data", "tensor", "pipeline", "expert", "sequence"];
  byId("toggles").replaceChildren(html("span", { class: "soft" }, "Color by"), ...names.map(name => {
    const parts = name === "sequence" ? sizeOver(tokenShardAxes()) : data.mesh[name];
    const button = html("button", { "aria-pressed": chosenAxes.has(name), "data-axis": name },
      name, html("small", {}, ` ${parts}`));
    button.disabled = parts === 1;
    button.title = parts > 1 ? "" : name === "sequence" ? unshared : "this mesh axis has size 1";
    button.addEventListener("click", () => {
      chosenAxes.has(name) ? chosenAxes.delete(name) : chosenAxes.add(name);
      button.setAttribute("aria-pressed", chosenAxes.has(name));
      color();
    });
    return button;
  }));
}
function color() {
  const names = [...new Set([...chosenAxes].flatMap(name => name === "sequence" ? tokenShardAxes() : [name]))];
  names.sort((a, b) => axes.indexOf(a) - axes.indexOf(b));
  const parts = sizeOver(names);
  const onAxis = new Set(names.flatMap(axis => groups({ op: "all-reduce", axes: [axis], stage: null }).flatMap(group =>
    group.flatMap(from => group.flatMap(to => from === to ? [] : route(from, to).map(([id]) => id))))));
  drawn.devices.forEach(({ node, place }, device) => {
    const index = indexOver(names, places[device]);
    node.classList.toggle("colored", parts > 1);
    node.classList.toggle("odd", parts > 10 && index % 2 === 1);
    node.style.setProperty("--hue", Math.round(250 + 360 * index / parts) % 360);
    const at = names.map(axis => places[device][axis]).join("·");
    place.textContent = at;
    const text = axes.map(axis => `${axis} ${places[device][axis]}`).join(", ");
    node.setAttribute("aria-label", `device ${device}: ${text}`);
  });
  for (const [id, { path }] of drawn.links) path.classList.toggle("dim", names.length > 0 && !onAxis.has(id));
  const said = names.join(" and ");
  const strips = chosenAxes.has("sequence") ? " (shards of the tokens, or of the context)" : "";
  byId("legend").textContent = names.length
    ? `Devices of one color have the same coordinate along ${said}${strips}; there are ${parts} such groups. Links `
      + `that ${said} do${names.length > 1 ? "" : "es"} not use are faint.`
    : "No mesh axis is selected.";
}

// --- arrays on a device ---

const partOrder = ["embedding", "attention", "dense_mlp", "router", "experts", "shared_expert", "norms", "head", "kv"];
function showDevice(device) {
  const at = places[device], total = data.bytes.weights + data.bytes.kv, limit = fabric.hbm_bytes;
  byId("device-name").textContent = `Device ${device}`;
  const host = `, ${fabric.kind === "torus" ? "host" : "node"} ${nodeOf(device)}`;
  showHost(nodeOf(device));
  const where = numDomains > 1 || fabric.node < numDevices ? host : "";
  byId("device-place").textContent = axes.map(axis => `${axis} ${at[axis]}`).join(" · ") + where;
  const held = byId("device-bytes");
  held.dataset.bytes = sum(data.arrays.map(bytesOf));
  held.textContent = `${size(total)}${limit ? ` of ${size(limit)}` : ""}${limit && total > limit ? ": does not fit" : ""}`;
  held.classList.toggle("wrong", Boolean(limit && total > limit));
  const { weights, kv } = data.bytes;
  held.append(html("small", { class: "soft" }, ` weights ${size(weights)}, KV cache ${size(kv)}`));
  showParts(total, limit);
  const rows = holdings(at).flatMap(([term, text]) => [html("dt", {}, term), html("dd", {}, text)]);
  byId("device-holds").replaceChildren(...rows);
  byId("device-arrays").replaceChildren(...data.arrays.map(array => html("tr", {},
    html("th", { scope: "row" }, ...nameOf(array)), html("td", {}, ...sliceOf(array, at)),
    html("td", { class: "number", title: `${count(bytesOf(array))} bytes` }, size(bytesOf(array))))));
}
let shownHost = -1;
function showHost(host) {  // replaced only for another host, so that a selected line stays selected
  if (data.launch.length === 1 || host === shownHost) return;
  shownHost = host;
  byId("host-launch").hidden = false;
  byId("host-name").textContent = `Start ${fabric.kind === "torus" ? "host" : "node"} ${host}`;
  byId("host-command").replaceChildren(command(data.launch[host]));
}
function showParts(total, limit) {
  const parts = bytesByPart(), there = partOrder.filter(part => parts.get(part));
  const hue = part => partOrder.indexOf(part) * 40 + 20;
  byId("device-bar").replaceChildren(...there.map(part => {
    const piece = html("i", { class: part === "kv" ? "kv" : "" });
    piece.style.cssText = `width:${100 * parts.get(part) / Math.max(total, limit || 0)}%;--hue:${hue(part)}`;
    return piece;
  }));
  byId("device-parts").replaceChildren(...there.map(part => {
    const key = html("i", { class: part === "kv" ? "kv" : "" });
    key.style.setProperty("--hue", hue(part));
    return html("li", { "data-part": part, "data-bytes": parts.get(part) }, key,
      `${part === "kv" ? "KV cache" : part} `, html("b", {}, size(parts.get(part))));
  }));
}
function holdings(at) {
  const { facts } = data, layers = layersHeld(at), experts = expertsHeld(at), cache = cacheHeld(at), rows = [];
  const all = layers.length === facts.layers;
  rows.push(["Layers", `${spans(layers)}${all ? " (all)" : ` (${layers.length} of ${facts.layers})`}`]);
  if (experts) {
    const share = experts.share < 1 ? `1/${Math.round(1 / experts.share)} of each` : "whole";
    rows.push(["Experts", experts.stop > experts.first
      ? `${span([experts.first, experts.stop])} of ${facts.experts}, ${share}` : "none: its expert slots are padding"]);
  }
  const plural = cache.heads.length === 1 ? "head" : "heads";
  const heads = facts.latent ? "the latent vector of every token"
    : `${plural} ${spans(cache.heads) || "none (padding)"} of ${facts.kv_heads}`;
  rows.push(["KV cache", `${heads}, of these layers`]);
  const part = sizeOver(data.pages.context_axes) > 1 ? `, tokens ${span(cache.offsets)} of each` : "";
  rows.push(["KV pages", `${span(cache.pages)}, ${data.pages.tokens} tokens each${part}`]);
  const rank = indexOver(data.pages.axes, at);
  const most = Math.ceil(data.max_num_seqs / data.pages.ranks);
  rows.push(["Requests", data.pages.ranks > 1 ? `batch rank ${rank}: up to ${most} of ${data.max_num_seqs}`
    : `all ${data.max_num_seqs}`]);
  const step = data.steps[phase], strip = indexOver(step.token_shard_axes, at);
  const strips = step.strip * sizeOver(step.token_shard_axes), own = span([strip * step.strip, (strip + 1) * step.strip]);
  if (step.token_shard_axes.length) rows.push(["Tokens", `${own} of ${strips} of its batch rank, in ${phase}`]);
  return rows;
}
function nameOf(array) {
  const [root, segment, ...rest] = array.path.split("/");
  if (!rest.length) return [root.replace("_", " ")];
  const part = data.segments[segment], block = root === "pages" ? null : Number(rest.shift());
  const layers = part.period === 1 || block === null ? range(part.first + part.period * part.repeats, part.first)
    : range(part.repeats).map(repeat => part.first + repeat * part.period + block);
  const some = layers.length > 1 && part.period > 1 && block !== null;
  const which = some ? `layers ${layers[0]}, ${layers[1]} … ${layers.at(-1)}`
    : `layer${layers.length > 1 ? "s" : ""} ${spans(layers)}`;
  return [rest.join(" ").replaceAll("_", " "), html("small", { class: "soft" }, which)];
}
// Stages hold layers in slots, ordered by stage and virtual stage. The row "Layers" lists the layers.
const dimName = (array, dim) => array.dims[dim] === "layer" ? "slot" : array.dims[dim].replaceAll("_", " ");
function sliceOf(array, at) {
  const own = slices(array, at), split = own.flatMap((slice, dim) => array.axes[dim].length
    ? [`${dimName(array, dim)} ${span(slice)} of ${array.shape[dim]}`] : []);
  const shape = own.map(([start, stop]) => stop - start).join(" × ");
  const times = array.times > 1 ? `, ${array.times} times` : "";
  return [split.join("; ") || "whole", html("small", { class: "soft" }, `${shape} ${array.dtype}${times}`)];
}
