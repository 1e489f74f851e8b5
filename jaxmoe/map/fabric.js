// Positions of devices and links in the drawing, and the route between two devices.
const fabric = data.fabric, numDomains = Math.ceil(numDevices / fabric.domain);
const domainOf = device => Math.floor(device / fabric.domain), nodeOf = device => Math.floor(device / fabric.node);
const members = domain => range(Math.min(numDevices, (domain + 1) * fabric.domain), domain * fabric.domain);

// The links from one device to another, as [link id, direction 0 or 1].
function route(from, to) {
  if (domainOf(from) !== domainOf(to))
    return [[`out:${from}`, 0], [`rail:${domainOf(from)}`, 0], ["network", 0],
      [`rail:${domainOf(to)}`, 1], [`out:${to}`, 1]];
  if (fabric.kind === "switch") return [[`up:${from}`, 0], [`switch:${domainOf(from)}`, 0], [`up:${to}`, 1]];
  if (fabric.kind === "peers") return [[`peer:${Math.min(from, to)}-${Math.max(from, to)}`, from < to ? 0 : 1]];
  return torusRoute(from, to);
}
// The shape of a torus, and which of its dims are rings. The last domain may have fewer devices than the others.
const isLast = domain => domain === numDomains - 1;
const shapeOf = domain => isLast(domain) ? fabric.last_shape : fabric.shape;
const wrapsOf = domain => isLast(domain) ? fabric.last_wraps : fabric.wraps;
const torusAt = device => {
  let rest = device % fabric.domain;
  return [...shapeOf(domainOf(device))].reverse().map(size => {
    const at = rest % size;
    rest = Math.floor(rest / size);
    return at;
  }).reverse();
};
const torusIndex = (at, domain) =>
  at.reduce((index, one, dim) => index * shapeOf(domain)[dim] + one, 0) + domain * fabric.domain;
function torusRoute(from, to) {  // dim by dim, in the shorter direction
  const at = torusAt(from), goal = torusAt(to), links = [], domain = domainOf(from);
  shapeOf(domain).forEach((size, dim) => {
    while (at[dim] !== goal[dim]) {
      const ahead = modulo(goal[dim] - at[dim], size), ring = wrapsOf(domain)[dim];
      const step = (ring ? ahead <= size / 2 : goal[dim] > at[dim]) ? 1 : -1, before = torusIndex(at, domain);
      at[dim] = modulo(at[dim] + step, size);
      const after = torusIndex(at, domain), low = step > 0 ? before : after;
      links.push([`torus:${dim}:${low}`, step > 0 ? 0 : 1]);
    }
  });
  return links;
}

// Bytes on every link in each direction for the transfers of some groups. Cached, because layers repeat collectives.
const known = new Map();
function loads(event, chosen) {
  const key = [event.op, event.axes, event.sent, event.stage, event.to, chosen.length, chosen[0]].join("|");
  if (known.has(key)) return known.get(key);
  const traffic = new Map();
  for (const group of chosen) for (const [from, to, size] of flows(event, group))
    for (const [id, way] of route(from, to)) {
      if (!traffic.has(id)) traffic.set(id, [0, 0]);
      traffic.get(id)[way] += size;
    }
  known.set(key, traffic);
  return traffic;
}

// The drawing of all domains: { width, height, boxes, devices: [{x, y}], links: [{id, d, kind, name}], round }.
function geometry(room) {
  const draw = { switch: switchDomain, peers: peersDomain, torus: torusDomain }[fabric.kind];
  const first = draw(room, 0), last = fabric.kind === "torus" ? draw(room, numDomains - 1) : first;
  const one = { ...first, width: Math.max(first.width, last.width), height: Math.max(first.height, last.height) };
  const across = Math.max(1, Math.min(numDomains, Math.floor((room + 20) / (one.width + 20))));
  const rows = Math.ceil(numDomains / across);
  const gutter = numDomains > 1 ? 46 : 8, left = numDomains > 1 ? 14 : 0;
  const figure = { width: left + across * (one.width + 20) - 20, height: rows * (one.height + gutter), round: one.round,
    boxes: [], devices: [], links: [] };
  const lines = [];
  range(numDomains).forEach(domain => {
    const x = left + domain % across * (one.width + 20), y = Math.floor(domain / across) * (one.height + gutter);
    const mine = members(domain), drawn = isLast(domain) ? last : first;
    figure.boxes.push({ x, y, width: one.width, height: one.height, name: boxName(domain) });
    mine.forEach((device, i) => figure.devices[device] = { x: x + drawn.devices[i].x, y: y + drawn.devices[i].y });
    const moved = path => path.replace(/([ML])([-\d.]+) ([-\d.]+)/g, (_, kind, a, b) => `${kind}${x + +a} ${y + +b}`);
    drawn.links(mine, domain).forEach(link => figure.links.push({ ...link, d: moved(link.d) }));
    if (numDomains > 1) {
      const trunk = x + drawn.width - 14, bottom = y + one.height;
      figure.links.push(...drawn.out(mine, domain).map(link => ({ ...link, d: moved(link.d) })));
      lines.push([trunk, bottom]);
      figure.links.find(link => link.id === `rail:${domain}`).d += ` M${trunk} ${y + drawn.height - 10} L${trunk} ${bottom + 22}`;
    }
  });
  if (numDomains > 1) {
    const rails = range(rows).map(row => (row + 1) * (one.height + gutter) - gutter + 22);
    const rail = y => `M6 ${y} L${Math.max(...lines.filter(([, bottom]) => bottom + 22 === y).map(([x]) => x))} ${y}`;
    const spine = rows > 1 ? ` M6 ${rails[0]} L6 ${rails.at(-1)}` : "";
    figure.links.push({ id: "network", kind: "out", name: "network between nodes", d: rails.map(rail).join(" ") + spine });
  }
  return figure;
}
function boxName(domain) {
  if (fabric.kind === "torus") return numDomains > 1 ? `slice ${domain}` : `torus ${fabric.shape.join(" × ")}`;
  return fabric.domain > fabric.node ? `fabric ${domain}` : `node ${domain}`;
}

const TILE = 38, PITCH = 48;
function switchDomain() {
  const size = fabric.domain, columns = size <= 8 ? size : [8, 12, 16].find(n => size / n <= 8) || 16;
  const rows = Math.ceil(size / columns), far = numDomains > 1, height = 22 + TILE + (far ? 26 : 14), top = 26;
  const devices = range(size).map(i =>
    ({ x: 16 + i % columns * PITCH + TILE / 2, y: top + Math.floor(i / columns) * height + 22 + TILE / 2 }));
  const width = 32 + (columns - 1) * PITCH + TILE, y = row => top + row * height;
  const last = row => devices[Math.min(size, (row + 1) * columns) - 1].x;
  return {
    width: Math.max(width, 110), height: top + rows * height + 4, devices, round: false,
    links: (mine, domain) => [
      { id: `switch:${domain}`, kind: "switch", name: `switch of ${boxName(domain)}`,
        d: range(rows).filter(row => row * columns < mine.length)
          .map(row => `M8 ${y(row) + 6} L${last(row) + 8} ${y(row) + 6}`).join(" ")
          + (rows > 1 ? ` M8 ${y(0) + 6} L8 ${y(rows - 1) + 6}` : "") },
      ...mine.map((device, i) => ({ id: `up:${device}`, kind: "up", name: `device ${device} to its switch`,
        d: `M${devices[i].x} ${devices[i].y - TILE / 2} L${devices[i].x} ${devices[i].y - TILE / 2 - 16}` }))],
    out: (mine, domain) => outLinks(mine, domain, devices, rows, columns, Math.max(width, 110), top + rows * height + 4),
  };
}
const railLink = (domain, d) => ({ id: `rail:${domain}`, kind: "out", name: `${boxName(domain)} to the network`, d });
const outLink = (device, a, b) => ({ id: `out:${device}`, kind: "out", name: `device ${device} to the network`,
  d: `M${a.x} ${a.y} L${b.x} ${b.y}` });
function outLinks(mine, domain, devices, rows, columns, width, height) {
  const below = row => devices[row * columns].y + TILE / 2 + 12, side = width - 14;
  const used = range(rows).filter(row => row * columns < mine.length);
  return [
    railLink(domain, used.map(row => `M${devices[row * columns].x} ${below(row)} L${side} ${below(row)}`).join(" ")
      + ` M${side} ${below(0)} L${side} ${height - 10}`),
    ...mine.map((device, i) => outLink(device, devices[i], { x: devices[i].x, y: devices[i].y + TILE / 2 + 12 }))];
}
function peersDomain() {
  const size = fabric.domain, radius = Math.max(78, size * 11), middle = radius + 44;
  const devices = range(size).map(i => {
    const angle = 2 * Math.PI * i / size - Math.PI / 2;
    return { x: middle + radius * Math.cos(angle), y: middle + radius * Math.sin(angle) };
  });
  const side = 2 * middle;
  return {
    width: side, height: side + 10, devices, round: true,
    links: mine => mine.flatMap((a, i) => mine.slice(i + 1).map((b, j) => ({
      id: `peer:${a}-${b}`, kind: "up", name: `device ${a} to device ${b}`,
      d: `M${devices[i].x} ${devices[i].y} L${devices[i + 1 + j].x} ${devices[i + 1 + j].y}` }))),
    out: (mine, domain) => [
      railLink(domain, `M${side - 14} ${side - 24} L${side - 14} ${side}`),
      ...mine.map((device, i) => {
        const out = (devices[i].x - middle) / radius, down = (devices[i].y - middle) / radius;
        return outLink(device, devices[i], { x: devices[i].x + 30 * out, y: devices[i].y + 30 * down });
      })],
  };
}
function torusDomain(room, drawn) {  // the longest dim goes right, the next one down, the third one into the page
  const shape = shapeOf(drawn), order = range(shape.length).sort((a, b) => shape[b] - shape[a] || a - b);
  const [right, down, away] = order;
  const depth = away === undefined ? 1 : shape[away], dx = 27, dy = 25;
  const stepX = Math.max(46, Math.min((depth - 1) * dx + 52, room / shape[right]));
  const stepY = Math.max(46, (depth - 1) * dy + 44);
  const place = at => {
    const z = away === undefined ? 0 : at[away];
    return { x: 38 + at[right] * stepX + z * dx, y: 50 + (at[down] || 0) * stepY + (depth - 1 - z) * dy };
  };
  const devices = members(drawn).map(device => place(torusAt(device)));
  const width = Math.max(...devices.map(one => one.x)) + 38, height = Math.max(...devices.map(one => one.y)) + 40;
  const toward = (a, b, part) => `M${a.x} ${a.y} L${a.x + (b.x - a.x) * part} ${a.y + (b.y - a.y) * part}`;
  return {
    width, height, devices, round: true,
    links: (mine, domain) => mine.flatMap((device, i) => shape.flatMap((size, dim) => {
      const at = torusAt(device), next = [...at], end = at[dim] === size - 1;
      if (size === 1 || end && (!wrapsOf(domain)[dim] || size === 2)) return [];
      next[dim] = (at[dim] + 1) % size;
      const other = torusIndex(next, domain), a = devices[i], b = devices[other % fabric.domain];
      const share = 20 / Math.hypot(b.x - a.x, b.y - a.y);
      const d = end ? `${toward(a, b, -share * 1.2)} ${toward(b, a, -share * 1.2)}` : toward(a, b, 1);
      const name = `device ${device} to device ${other}${end ? ", closing the ring" : ""}`;
      return [{ id: `torus:${dim}:${device}`, kind: "up", name, d }];
    })),
    out: (mine, domain) => [
      railLink(domain, `M${width - 14} ${height - 24} L${width - 14} ${height - 10}`),
      ...mine.map((device, i) => outLink(device, devices[i], { x: devices[i].x, y: devices[i].y + 20 }))],
  };
}
