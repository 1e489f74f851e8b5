// Fills the page: title, collectives of a whole step, and keyboard control.
function showTitle() {
  const { facts } = data, kinds = { switch: "Switch", torus: "Torus", peers: "A link between each pair" };
  const plural = (number, word, kept) => `${number} ${word}${number > 1 && !kept ? "s" : ""}`;
  byId("title").textContent = data.model;
  document.title = `${data.model} on ${numDevices} devices · jaxmoe map`;
  const named = axes.filter(axis => data.mesh[axis] > 1).map(axis => `${axis}=${data.mesh[axis]}`);
  const mesh = named.join(" × ") || "one device";
  const nodes = Math.ceil(numDevices / fabric.node), hosts = fabric.kind === "torus" ? "host" : "node";
  byId("facts").textContent = [
    data.family, `${facts.layers} layers`,
    facts.experts ? `${facts.experts} experts, ${facts.top_k} per token` : "dense", mesh, `layout ${data.layout}`, `${plural(numDevices, fabric.given ? fabric.name : "device", fabric.given)} on `
      + plural(nodes, hosts),
    `activations ${data.dtype}, weights ${data.weights_dtype}, KV cache ${data.kv_dtype}`,
    `${data.max_num_seqs} requests of ${count(data.context)} tokens`].join(" · ");
  const beyond = numDomains > 1 ? `, ${fabric.scale_out_gbps} GB/s between fabrics` : "";
  byId("note").textContent = fabric.given
    ? `${kinds[fabric.kind]}: ${fabric.scale_up_gbps} GB/s per device and direction${beyond}; `
      + `${size(fabric.hbm_bytes)} of memory per device.`
    : "No hardware was given, so the page draws one node with a switch, without bandwidths and memory limit. "
      + "Choose hardware with --hardware.";
  showLaunch(hosts);
}
function showLaunch(hosts) {
  const [first] = data.launch, several = data.launch.length > 1;
  const indices = several ? [`I = 0 … ${data.launch.length - 1}`] : [];
  const notes = [...indices, ...data.launch_placeholders].join("; ");
  byId("launch").replaceChildren(several ? `Start it on every ${hosts}: ` : "Start it: ",
    command(several ? first.replace(/0$/, "I") : first),
    ...notes ? [html("small", { class: "soft" }, notes)] : []);
}
function showStep() {
  const rows = data.collectives.filter(one => one.phase === phase), step = data.steps[phase];
  const compiled = rows.some(one => one.compiled !== null);
  const tick = data.mesh.pipeline > 1 && phase === "decode" ? "pipeline tick" : "step";
  const wrong = rows.filter(one => one.compiled !== null && one.compiled !== one.planned).length;
  const parts = step.micro_batches > 1 ? `, in ${step.micro_batches} micro-batches` : "";
  const words = [`${phase}: ${count(step.tokens)} tokens per batch rank, with padding${parts}; counts are per `
    + `${tick}.`];
  const differ = wrong ? `${wrong} of ${rows.length} differ from the plan.` : "all as planned.";
  const verdict = compiled ? differ : "this step was not compiled.";
  if (data.compiled) words.push(`Compiled for ${data.compiled.target}: ${verdict}`, comparedBytes());
  byId("collectives-note").textContent = words.join(" ");
  const head = ["collective", "axes", "where", "result on a device", "sent per device, each", "planned",
    ...compiled ? ["compiled", ""] : []];
  byId("collectives-head").replaceChildren(html("tr", {}, ...head.map((name, i) =>
    html("th", { scope: "col", class: i > 2 && i < 7 ? "number" : "" }, name))));
  byId("collectives").replaceChildren(...rows.length ? rows.map(one => {
    const differs = one.compiled !== null && one.compiled !== one.planned;
    const number = (text, more = {}) => html("td", { class: "number", ...more }, text);
    return html("tr", differs ? { class: "wrong" } : {},
      html("th", { scope: "row" }, one.op), html("td", {}, one.axes.join(" × ")),
      html("td", {}, one.location.join(", ") || "not in the plan"),
      number(size(one.bytes), { title: `${count(one.bytes)} bytes` }), number(one.sent === null ? "" : size(one.sent)),
      number(count(one.planned)),
      ...compiled ? [number(count(one.compiled)), html("td", {}, differs ? "differs" : "as planned")] : []);
  }) : [html("tr", {}, html("td", { colspan: head.length }, "None: the devices do not communicate."))]);
}
function comparedBytes() {
  const { weights, kv, temp } = data.compiled.bytes, same = weights === data.bytes.weights && kv === data.bytes.kv;
  const beside = temp === null ? "" : ` Temporary buffers need ${size(temp)} more.`;
  return same ? `Weights and pages take the planned bytes.${beside}`
    : `It has ${count(weights)} bytes of weights and ${count(kv)} of pages; the plan has `
      + `${count(data.bytes.weights)} and ${count(data.bytes.kv)}.${beside}`;
}

byId("back").addEventListener("click", () => { pause(); go(at - 1); });
byId("forward").addEventListener("click", () => { pause(); go(at + 1); });
byId("play").addEventListener("click", () => playing() ? pause() : play());
byId("position").addEventListener("input", event => { pause(); go(Number(event.target.value)); });
document.addEventListener("keydown", event => {
  if (event.key !== " " || event.target.closest("button, input, select, summary")) return;
  event.preventDefault();
  playing() ? pause() : play();
});
for (const name of Object.keys(data.steps)) {
  const button = html("button", { "data-phase": name, "aria-pressed": false }, name);
  button.addEventListener("click", () => { pause(); setPhase(name); });
  byId("phases").append(button);
}
const longest = axes.filter(axis => data.mesh[axis] > 1).sort((a, b) => data.mesh[b] - data.mesh[a])[0];
if (longest) chosenAxes.add(longest);
showTitle();
drawMesh();
drawStages();
setPhase("decode");
