// The curves and the sortable table of a page; all data is what page.py or search_page.py wrote into it.
"use strict";
const { metrics, axes, curves, split = "test" } = JSON.parse(document.getElementById("data").textContent);
const tip = document.getElementById("tip");
const state = { metric: metrics[0].name, hidden: new Set() };
const figures = [...document.querySelectorAll("figure")].map(build);

function build(element) {
  const svg = element.querySelector("svg.plot");
  const figure = { element, svg, links: "links" in element.dataset, x: element.dataset.x.split(" ")[0], marks: [] };
  const shown = curves.filter(curve => curve.points.some(point => point.x[figure.x]));
  for (const select of element.querySelectorAll("select"))
    select.onchange = () => {
      if (select.name === "metric") state.metric = select.value;
      else figure.x = select.value;
      drawAll();
    };
  for (const button of element.querySelectorAll(".controls button"))
    button.onclick = () => {
      for (const curve of shown) state.hidden[button.name === "none" ? "add" : "delete"](curve.method);
      drawAll();
    };
  const legend = element.querySelector(".legend");
  for (const curve of shown) {
    const button = legend.appendChild(document.createElement("li")).appendChild(document.createElement("button"));
    button.type = "button";
    button.dataset.method = curve.method;
    const swatch = make("svg", { viewBox: "0 0 34 14" }, button, svg.namespaceURI);
    const group = make("g", { class: "curve", style: `color: ${curve.colour}` }, swatch);
    if (!curve.loose) make("path", { d: "M1 7H33", "stroke-dasharray": curve.dashes }, group);
    if (!curve.reference || figure.links) mark(curve, 17, 7, group);
    button.append(curve.method);
    button.onclick = () => {
      state.hidden.delete(curve.method) || state.hidden.add(curve.method);
      drawAll();
      focus(figure, curve.method);
    };
    button.onpointerenter = button.onfocus = () => focus(figure, curve.method);
    button.onpointerleave = button.onblur = () => focus(figure);
  }
  svg.onpointermove = svg.onpointerdown = event => hover(figure, event);
  svg.onpointerleave = () => hover(figure);
  new ResizeObserver(() => draw(figure)).observe(element);
  return figure;
}

function make(tag, attributes, parent, space = parent.namespaceURI) {
  const node = document.createElementNS(space, tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== "") node.setAttribute(name, value);
  return parent.appendChild(node);
}

function text(words, x, y, anchor, parent, look = "") {
  make("text", { x, y, "text-anchor": anchor, class: look }, parent).textContent = words;
}

function mark(curve, x, y, parent) {
  const [corners, star, angle] = curve.marker, count = star ? 2 * corners : corners;
  const at = i => {
    const turn = (2 * Math.PI * i) / count - Math.PI / 2 + (angle * Math.PI) / 180, far = star && i % 2 ? 2.4 : 5;
    return `${(x + far * Math.cos(turn)).toFixed(1)} ${(y + far * Math.sin(turn)).toFixed(1)}`;
  };
  const d = `M${Array.from({ length: count }, (_, i) => at(i)).join("L")}Z`;
  return make("path", { d, class: curve.open ? "mark open" : "mark" }, parent);
}

function drawAll() {
  for (const figure of figures) draw(figure);
}

function scale(values, logarithmic, from, to) {
  let [low, high] = [Math.min(...values), Math.max(...values)];
  const bend = logarithmic ? Math.log : value => value;
  const margin = (bend(high) - bend(low)) * 0.05 || 0.05 * Math.abs(bend(high)) || 1;
  const back = logarithmic ? Math.exp : value => value;
  [low, high] = [back(bend(low) - margin), back(bend(high) + margin)];
  const place = value => from + ((to - from) * (bend(value) - bend(low))) / (bend(high) - bend(low));
  return { place, ticks: ticks(low, high, logarithmic) };
}

function ticks(low, high, logarithmic) {
  const found = [], wide = high / low;
  if (logarithmic && wide > 2.5) {
    const steps = wide > 2000 ? [1] : wide > 12 ? [1, 2, 5] : [1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8];
    for (let power = 10 ** Math.floor(Math.log10(low)); power <= high; power *= 10)
      found.push(...steps.map(step => step * power));
  } else {
    const rough = (high - low) / 5, power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 5, 10].find(factor => factor * power >= rough);
    for (let i = Math.ceil(low / step); i * step <= high; i++) found.push(i * step);
  }
  return found.filter(value => value >= low && value <= high);
}

function draw(figure) {
  const { svg, element } = figure, width = svg.clientWidth, height = Math.max(300, Math.min(600, 0.68 * width));
  const [left, right, top, bottom] = [52, width - 14, 12, height - 44];
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.replaceChildren();
  svg.classList.remove("focused");
  figure.marks = [];
  for (const select of element.querySelectorAll("select[name=metric]")) select.value = state.metric;
  for (const button of element.querySelectorAll(".legend button"))
    button.setAttribute("aria-pressed", !state.hidden.has(button.dataset.method));
  const has = point => point.x[figure.x] && point.values[state.metric];
  const visible = curves
    .filter(curve => !state.hidden.has(curve.method))
    .map(curve => ({ ...curve, level: curve.reference && !figure.links, points: curve.points.filter(has) }))
    .filter(curve => curve.points.length);
  const across = visible.filter(curve => !curve.level).flatMap(curve => curve.points.map(point => point.x[figure.x]));
  const values = visible.flatMap(curve => curve.points.flatMap(point => point.values[state.metric]));
  if (!values.length) return text("No curve is selected, or nothing was measured.", width / 2, height / 2, "middle", svg);
  const x = scale(across.length ? across : [1, 10], true, left, right);
  const y = scale(values, values.every(value => value > 0), bottom, top);
  let free = -Infinity;
  for (const tick of x.ticks) {
    const at = x.place(tick), words = axes[figure.x].divide ? tick / axes[figure.x].divide : tick;
    make("path", { class: "grid", d: `M${at} ${top}V${bottom}` }, svg);
    const label = Number(words.toPrecision(3)).toLocaleString("en");
    if (at - free > 4 * label.length) text(label, at, bottom + 17, "middle", svg), (free = at + 4 * label.length);
  }
  for (const tick of y.ticks) {
    make("path", { class: "grid", d: `M${left} ${y.place(tick)}H${right}` }, svg);
    text(Number(tick.toPrecision(4)).toLocaleString("en"), left - 7, y.place(tick) + 4, "end", svg);
  }
  text(axes[figure.x].label, (left + right) / 2, height - 6, "middle", svg, "title");
  make("text", { transform: `translate(13 ${(top + bottom) / 2}) rotate(-90)`, "text-anchor": "middle", class: "title" }, svg)
    .textContent = `${split} ` + metrics.find(metric => metric.name === state.metric).label;
  const levels = visible.filter(curve => curve.level).sort((a, b) => level(b) - level(a));
  for (const curve of visible) {
    const group = make("g", { class: "curve", style: `color: ${curve.colour}`, "data-method": curve.method }, svg);
    if (curve.level) {
      const at = y.place(level(curve)), first = curve === levels[0];
      make("path", { d: `M${left} ${at}H${right}`, "stroke-dasharray": curve.dashes }, group);
      text(curve.words[state.metric], first ? left + 6 : right - 6, first ? at - 6 : at + 15, first ? "start" : "end", svg, "halo");
      figure.marks.push({ x: null, y: at, curve, point: curve.points[0] });
      continue;
    }
    const places = curve.points.map(point => [x.place(point.x[figure.x]), y.place(point.values[state.metric][0]), point]);
    places.sort((a, b) => a[0] - b[0]);
    const d = "M" + places.map(([px, py]) => `${px.toFixed(1)} ${py.toFixed(1)}`).join("L");
    if (!curve.loose) make("path", { d, class: figure.links ? "link" : "line", "stroke-dasharray": curve.dashes }, group);
    for (const [px, py, point] of places) {
      const [, low, high] = point.values[state.metric];
      if (high > low) make("path", { class: "bar", d: `M${px} ${y.place(low)}V${y.place(high)}m-3 0h6M${px - 3} ${y.place(low)}h6` }, group);
      mark(curve, px, py, group);
      figure.marks.push({ x: px, y: py, curve, point });
    }
    if (figure.links && curve.reference) {
      const [px, py] = places[0], over = px > (left + right) / 2;
      text(curve.method, over ? px - 9 : px + 9, py + 4, over ? "end" : "start", svg, "halo");
    }
  }
}

function level(curve) {
  return curve.points[0].values[state.metric][0];
}

function focus(figure, method) {
  figure.svg.classList.toggle("focused", method !== undefined && !state.hidden.has(method));
  for (const group of figure.svg.querySelectorAll(".curve"))
    group.classList.toggle("focus", group.dataset.method === method);
}

function hover(figure, event) {
  const box = figure.svg.getBoundingClientRect();
  const far = at => Math.hypot(at.x === null ? 15 : at.x - event.clientX + box.left, at.y - event.clientY + box.top);
  const near = event && figure.marks.reduce((best, at) => (far(at) < (best ? far(best) : 22) ? at : best), null);
  tip.hidden = !near;
  focus(figure, near?.curve.method);
  if (!near) return;
  tip.replaceChildren(document.createElement("b"), document.createElement("dl"));
  tip.firstChild.textContent = near.point.title;
  for (const [name, value] of near.point.lines) {
    tip.lastChild.appendChild(document.createElement("dt")).textContent = name;
    tip.lastChild.appendChild(document.createElement("dd")).textContent = value;
  }
  const x = near.x ?? event.clientX - box.left, edge = document.documentElement.clientWidth;
  const wide = tip.offsetWidth, start = box.left + x + 14;
  tip.style.left = `${scrollX + Math.max(4, start + wide < edge ? start : Math.min(start - wide - 28, edge - wide - 4))}px`;
  tip.style.top = `${scrollY + Math.max(4, box.top + near.y - tip.offsetHeight - 10)}px`;
}

for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    head.querySelector("button").onclick = () => {
      const down = head.ariaSort === "ascending";
      for (const other of heads) other.ariaSort = other === head ? (down ? "descending" : "ascending") : "none";
      const key = row => row.cells[column]?.dataset.value;
      const compare = (a, b) => (isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b) * (down ? -1 : 1);
      const rows = [...table.tBodies[0].rows].sort((one, two) => {
        const [a, b] = [key(one), key(two)];
        return a === undefined || b === undefined ? (a === undefined) - (b === undefined) : compare(a, b);
      });
      table.tBodies[0].append(...rows);
    };
  });
}
