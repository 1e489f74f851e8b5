// Derives coordinates, slices, the path of a token and the traffic of collectives from the data. Draws nothing.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const axes = Object.keys(data.mesh);
const sizeOver = names => names.reduce((product, axis) => product * data.mesh[axis], 1);
const numDevices = sizeOver(axes);
const range = (stop, start = 0) => Array.from({ length: Math.max(0, stop - start) }, (_, i) => start + i);
const sum = values => values.reduce((a, b) => a + b, 0);

// Devices are numbered in row-major order of the mesh: the last axis is the innermost.
function coordinates(device) {
  const at = {};
  for (const axis of [...axes].reverse()) {
    at[axis] = device % data.mesh[axis];
    device = Math.floor(device / data.mesh[axis]);
  }
  return at;
}
const places = range(numDevices).map(coordinates);
const indexOver = (names, at) => names.reduce((index, axis) => index * data.mesh[axis] + at[axis], 0);

// --- what a device holds ---

// The slice [start, stop) of every dim of an array, on the device at these coordinates.
function slices(array, at) {
  return array.shape.map((size, dim) => {
    const share = size / sizeOver(array.axes[dim]), start = indexOver(array.axes[dim], at) * share;
    return [start, start + share];
  });
}
const bytesOf = array => array.times * array.itemsize * array.shape.reduce((product, size, dim) =>
  product * size / sizeOver(array.axes[dim]), 1);

function bytesByPart() {
  const parts = new Map();
  for (const array of data.arrays) parts.set(array.part, (parts.get(array.part) || 0) + bytesOf(array));
  return parts;
}

// Number of repeats in a virtual stage, and the slot of every repeat, as in depth.LayerSegment.
function filled(part, stage, virtualStage) {
  const each = Math.floor(part.repeats / (part.stages * part.virtual_stages)), left = part.repeats % (part.stages * part.virtual_stages);
  return each + (virtualStage * part.stages + stage < left ? 1 : 0);
}
function visits(part) {  // stage, virtual stage and slot of every repeat, in the order of the layers
  const matches = [];
  for (const virtualStage of range(part.virtual_stages)) for (const stage of range(part.stages))
    for (const at of range(filled(part, stage, virtualStage)))
      matches.push({ stage, virtualStage, slot: (stage * part.virtual_stages + virtualStage) * part.virtual_stage_slots + at });
  return matches;
}
const slicesNamed = (array, at) => Object.fromEntries(slices(array, at).map((slice, dim) => [array.dims[dim], slice]));
const arraysOf = (segment, dim) => data.arrays.filter(one =>
  one.path.split("/")[1] === String(segment) && one.dims.includes(dim));

function layersHeld(at) {
  const layers = [];
  data.segments.forEach((part, segment) => {
    const [start, stop] = slicesNamed(arraysOf(segment, "layer")[0], at).layer;
    visits(part).forEach(({ slot }, repeat) => {
      if (slot < start || slot >= stop) return;
      layers.push(...range(part.period).map(block => part.first + repeat * part.period + block));
    });
  });
  return layers;
}
function expertsHeld(at) {  // { first, stop, share } or null; share: fraction of each expert's width on this device
  const array = data.arrays.find(one => one.dims.includes("moe_expert") && one.dims.includes("moe_ffn"));
  if (!array) return null;
  const [first, stop] = slicesNamed(array, at).moe_expert, width = array.dims.indexOf("moe_ffn");
  return { first, stop: Math.min(stop, data.facts.experts), share: 1 / sizeOver(array.axes[width]) };
}
function cacheHeld(at) {  // { heads, pages, offsets } of the KV cache of the stage's layers
  const segment = Math.max(0, data.segments.findIndex(part => part.stages > 1)), part = data.segments[segment];
  const named = slicesNamed(data.arrays.find(one => one.path.startsWith(`pages/${segment}/`)), at);
  const slots = range(named.kv_head[1], named.kv_head[0]).filter(slot => slot < data.facts.kv_heads * part.kv_copies);
  const heads = [...new Set(slots.map(slot => Math.floor(slot / part.kv_copies)))];
  return { heads, pages: named.page, offsets: named.page_token };
}

// --- the path of a token ---

// Every location on the path, in order, with its collective. op is null if devices only compute there.
function tokenPath(phase) {
  const { sites } = data.steps[phase], path = [];
  const say = (site, more) => path.push({ segment: null, layer: null, stage: null, to: null, ...site, ...more });
  const silent = location => ({ location, op: null, axes: [], bytes: 0, sent: 0 });
  const at = where => sites.filter(site => site.location === where);
  const outside = (where, always) => {
    const matches = at(where);
    (matches.length || !always ? matches : [silent(where)]).forEach(site => say(site, {}));
  };
  outside("embedding", true);
  data.segments.forEach((part, segment) => {
    const order = visits(part);
    order.forEach(({ stage, virtualStage }, repeat) => {
      for (const block of range(part.period)) {
        const own = sites.filter(site => site.segment === segment && site.block === block);
        const rest = own.filter(site => site.location !== "attention");
        const inside = own.filter(site => site.location === "attention");
        if (!inside.length) inside.push(silent("attention"));
        const kind = part.moe[block] ? "experts" : "mlp", back = rest.findIndex(site => site.location === "combine");
        if (back >= 0) rest.splice(back, 0, silent("experts"));
        else if (!rest.length) rest.push(silent(kind));
        const where = { segment, layer: part.first + repeat * part.period + block, stage: part.stages > 1 ? stage : null };
        [...inside, ...rest].forEach(site => say(site, where));
      }
      const next = order[repeat + 1];
      if (next && (next.stage !== stage || next.virtualStage !== virtualStage))
        at("between stages").forEach(site => say(site, { stage, to: next.stage }));
    });
    if (part.stages > 1) outside("from the last stage", false);
  });
  outside("sampled rows", false);
  outside("head", true);
  return path;
}

// --- the traffic of collectives ---

// Groups of devices of a collective: along its axes, and only in its stage if the token is in one stage.
function groups(event) {
  if (event.op === "collective-permute") return between(event);
  const matches = new Map();
  places.forEach((at, device) => {
    if (event.stage !== null && !event.axes.includes("pipeline") && at.pipeline !== event.stage) return;
    const key = axes.filter(axis => !event.axes.includes(axis)).map(axis => at[axis]).join();
    if (!matches.has(key)) matches.set(key, []);
    matches.get(key).push(device);
  });
  const order = device => indexOver(event.axes, places[device]);
  return [...matches.values()].map(group => group.sort((a, b) => order(a) - order(b)));
}
function between({ stage, to }) {
  const same = axes.filter(axis => axis !== "pipeline");
  return range(numDevices).filter(device => places[device].pipeline === stage).map(device =>
    [device, range(numDevices).find(other => places[other].pipeline === to
      && same.every(axis => places[other][axis] === places[device][axis]))]);
}

// Transfers [from, to, bytes] of a collective in one group.
function flows(event, group) {
  const count = group.length;
  if (event.op === null || count < 2) return [];
  if (event.op === "collective-permute") return [[group[0], group[1], event.sent]];
  if (event.op === "all-reduce") return group.map((device, i) => [device, group[(i + 1) % count], event.sent]);
  return group.flatMap(from => group.filter(to => to !== from).map(to => [from, to, event.sent / (count - 1)]));
}
const onlyStage = event => event.op === "collective-permute" || event.stage !== null && !event.axes.includes("pipeline");
const sends = (event, device) => event.op !== null && (!onlyStage(event) || places[device].pipeline === event.stage);

// --- the pipeline schedule, as in depth.PipelineSchedule ---

const modulo = (a, b) => ((a % b) + b) % b;
function schedule(stages, virtualStages, microBatches, decodeSteps = 1) {
  const period = Math.max(stages, microBatches), ticks = (decodeSteps * virtualStages - 1) * period + microBatches + stages - 1;
  const slot = (tick, stage) => {
    const step = tick - stage, lap = Math.floor(step / period), microBatch = modulo(step, period);
    const decodeStep = Math.floor(lap / virtualStages), virtualStage = modulo(lap, virtualStages);
    return { decodeStep, virtualStage, microBatch, valid: step >= 0 && microBatch < microBatches && decodeStep < decodeSteps };
  };
  return { ticks, slot, idle: [ticks - decodeSteps * virtualStages * microBatches, ticks] };
}
