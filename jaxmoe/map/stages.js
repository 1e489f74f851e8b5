// Draws the pipeline schedule: the micro-batch of every stage and tick, and the bubbles.
function drawStages() {
  const stages = data.mesh.pipeline, room = byId("stages");
  if (stages === 1) {
    room.replaceChildren(html("p", {}, "This mesh has one stage: every device computes every layer, so there are no "
      + "pipeline bubbles. With pipeline=2 or more, the stages and their bubbles are drawn here."));
    return;
  }
  const part = data.segments.find(one => one.stages > 1);
  const first = data.micro_batches || data.steps.prefill.micro_batches;
  const sliders = [
    slider("micro-batches M", "M", 1, Math.max(32, first), first),
    slider("virtual stages v", "v", 1, part.max_virtual_stages, part.virtual_stages), slider("decode steps", "decode-steps", 1, 8, 1)];
  const figure = html("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Pipeline stages by tick" });
  const formula = html("p", { id: "idle", "aria-live": "polite" });
  const redraw = () => {
    const [microBatches, virtualStages, decodeSteps] = sliders.map(one => Number(one.input.value));
    sliders.forEach(one => one.output.textContent = one.input.value);
    const plan = schedule(stages, virtualStages, microBatches, decodeSteps), [idle, ticks] = plan.idle;
    figure.replaceChildren(stageGrid(plan, stages, microBatches, virtualStages, decodeSteps));
    formula.dataset.idle = `${idle}/${ticks}`;
    const layers = Math.ceil(part.repeats / stages / virtualStages) * part.period;
    formula.replaceChildren("idle = 1 − decode steps · v · M ⁄ ticks = 1 − ",
      html("b", {}, `${ticks - idle} ⁄ ${ticks}`),
      ` = ${(100 * idle / ticks).toFixed(1)} %`,
      html("small", { class: "soft" },
        `ticks = (decode steps · v − 1) · max(P, M) + M + P − 1, with P = ${stages} stages; in a tick a stage computes `
        + `one micro-batch in one virtual stage, which has at most ${layers} layers`));
  };
  sliders.forEach(one => one.input.addEventListener("input", redraw));
  const key = "Color and number show the micro-batch; darker shades are later virtual stages. Hatched cells are bubbles. "
    + "Embedding, head and layers outside the pipeline run on all stages and are not drawn.";
  const controls = html("div", { class: "row" }, ...sliders.map(one => one.label));
  room.replaceChildren(controls, figure, formula, html("p", { class: "soft" }, key));
  redraw();
}
function slider(name, letter, min, max, value) {
  const input = html("input", { type: "range", min, max, value: Math.min(max, value), id: `slider-${letter}` });
  const output = html("output", {}, value);
  return { input, output, label: html("label", {}, `${name} = `, output, " ", input) };
}
function stageGrid(plan, stages, microBatches, virtualStages, decodeSteps) {
  const left = 58, high = 26, wide = Math.max(7, Math.min(34, Math.floor(1080 / plan.ticks)));
  const width = left + plan.ticks * wide + 4;
  const root = svg("svg", { viewBox: `0 0 ${width} ${stages * high + 26}`, width, height: stages * high + 26, role: "img",
    "aria-label": `${stages} stages over ${plan.ticks} ticks, ${microBatches} micro-batches, ${virtualStages} virtual stages, `
      + `${decodeSteps} decode steps` });
  root.append(svg("defs", {}, svg("pattern",
    { id: "hatch", width: 6, height: 6, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" },
    svg("rect", { width: 6, height: 6, class: "ground" }), svg("line", { x1: 0, x2: 0, y1: 0, y2: 6, class: "stroke" }))));
  for (const stage of range(stages)) {
    root.append(worded("text", { x: 0, y: stage * high + 17 }, `stage ${stage}`));
    for (const tick of range(plan.ticks)) {
      const slot = plan.slot(tick, stage);
      const box = { x: left + tick * wide, y: stage * high + 2, width: wide - 1, height: high - 4, rx: 2 };
      const label = slot.valid
        ? `micro-batch ${slot.microBatch}, virtual stage ${slot.virtualStage}, decode step ${slot.decodeStep}` : "bubble";
      const cell = svg("rect", { ...box, class: slot.valid ? "unit" : "bubble" },
        worded("title", {}, `stage ${stage}, tick ${tick}: ${label}`));
      cell.style.setProperty("--hue", Math.round(250 + 360 * slot.microBatch / microBatches) % 360);
      cell.style.setProperty("--virtual-stage", slot.virtualStage / Math.max(1, virtualStages - 1));
      root.append(cell);
      const at = { class: "unit", x: box.x + wide / 2 - .5, y: stage * high + 17 };
      if (slot.valid && wide >= 15) root.append(worded("text", at, slot.microBatch));
    }
  }
  const every = Math.max(1, Math.ceil(40 / wide));
  for (const tick of range(plan.ticks).filter(one => one % every === 0))
    root.append(worded("text", { class: "tick", x: left + tick * wide + wide / 2, y: stages * high + 16 }, tick));
  return root;
}
