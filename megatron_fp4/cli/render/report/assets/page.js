"use strict";
// Draws the charts of a report with uPlot. The data are the JSON element of the page; colours are those of page.css.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const COLORS = 8, SHAPES = "●■◆▲▼";
  const LETTERS = { "precision switch": "P", "data phase": "D", "learning rate": "L", resume: "R", rollback: "B" };
  const hidden = new Set(); // numbers of runs
  const views = [];
  let axis = "t"; // over tokens, or "s": steps
  let zooming = false;

  // Numbers ------------------------------------------------------------------------------------------------------------
  function digits(value, count) {
    if (value === 0) return "0";
    const size = Math.abs(value);
    return size >= 1e5 || size < 1e-3 ? value.toExponential(count - 2) : String(+value.toPrecision(count));
  }
  function counted(value, count = 4) {
    for (const [size, unit] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]])
      if (Math.abs(value) >= size) return +(value / size).toPrecision(count) + unit;
    return String(+value.toPrecision(count));
  }
  function timed(value, count = 4) {
    const size = Math.abs(value);
    if (size >= 7200) return +(value / 3600).toPrecision(count) + " h";
    if (size >= 300) return +(value / 60).toPrecision(count) + " min";
    if (size >= 1 || size === 0) return +value.toPrecision(count) + " s";
    return size >= 1e-3 ? +(value * 1e3).toPrecision(count) + " ms" : +(value * 1e6).toPrecision(count) + " µs";
  }
  const writers = { seconds: timed, count: counted, percent: (value, count = 4) => digits(value, count) + " %" };
  const writer = (unit) => writers[unit] || ((value, count = 5) => digits(value, count));

  // One chart ----------------------------------------------------------------------------------------------------------
  const lineColor = (line) => color("--c" + ((line.color === null ? line.run : line.color) % COLORS));
  const at = (line) => (axis === "s" && line.s ? line.s : line.t);
  const isShown = (line) => line.shown && !hidden.has(line.run);

  function aligned(view) {
    const lines = view.chart.lines.filter((line) => line.shown);
    const tables = lines.map((line) => [at(line), view.log ? line.y.map((y) => (y > 0 ? y : null)) : line.y]);
    return [lines, tables.length ? uPlot.join(tables) : [[]]];
  }

  function nearest(u, series, index, x) {
    const xs = u.data[0], ys = u.data[series];
    let left = index, right = index;
    while (left >= 0 && ys[left] == null) left--;
    while (right < ys.length && ys[right] == null) right++;
    if (left < 0) return right < ys.length ? right : index;
    return right < ys.length && xs[right] - x < x - xs[left] ? right : left;
  }

  function shape(context, number, x, y, size) {
    context.beginPath();
    if (number === 0) context.arc(x, y, size, 0, 2 * Math.PI);
    else {
      const corners = [[], [[-1, -1], [1, -1], [1, 1], [-1, 1]], [[0, -1.4], [1.4, 0], [0, 1.4], [-1.4, 0]],
        [[0, -1.3], [1.3, 1], [-1.3, 1]], [[0, 1.3], [1.3, -1], [-1.3, -1]]][number];
      corners.forEach(([a, b], i) => context[i ? "lineTo" : "moveTo"](x + a * size, y + b * size));
      context.closePath();
    }
    context.fill();
  }

  function drawDots(line) {
    return (u, series, first, last) => {
      const context = u.ctx, xs = u.data[0], ys = u.data[series];
      context.save();
      context.fillStyle = lineColor(line);
      for (let i = first; i <= last; i++)
        if (ys[i] != null)
          shape(context, line.shape % 5, u.valToPos(xs[i], "x", true), u.valToPos(ys[i], "y", true), 3.6 * devicePixelRatio);
      context.restore();
      return false;
    };
  }

  function seriesOf(line) {
    const few = line.y.length < 40;
    const look = { label: line.name, stroke: () => lineColor(line), show: isShown(line), width: 1.3, alpha: 1,
      points: { show: few && line.style === "line", size: 4 } };
    if (line.style === "raw") Object.assign(look, { width: 1, alpha: 0.3, points: { show: false } });
    if (line.style === "trend") Object.assign(look, { width: 2.2, points: { show: line.y.length < 2 } });
    if (line.style === "dots") Object.assign(look, { width: 1, alpha: 0.9, dash: [2, 4], points: { show: drawDots(line) } });
    return look;
  }

  // Vertical lines where something changed, with the letter of what it was; dotted ones where a value was not finite.
  function marksOf(view) {
    const broken = view.chart.broken.map(([run, t, s]) => ({ run, t, s, kind: "", text: "loss not finite" }));
    return data.marks.concat(broken).filter((mark) => !hidden.has(mark.run) && view.runs.has(mark.run));
  }
  function drawMarks(view, u) {
    const { ctx: context, bbox: box } = u, scale = devicePixelRatio;
    context.save();
    context.font = `${10 * scale}px system-ui, sans-serif`;
    context.textAlign = "center";
    const taken = [], marks = marksOf(view), place = (mark) => mark.kind + mark[axis];
    const shared = (mark) => marks.some((other) => other.run !== mark.run && place(other) === place(mark));
    for (const mark of marks.filter((one, i) => marks.findIndex((other) => place(other) === place(one)) === i || !one.kind)) {
      const x = u.valToPos(mark[axis], "x", true);
      if (x < box.left || x > box.left + box.width) continue;
      context.strokeStyle = context.fillStyle = shared(mark) ? color("--soft") : color("--c" + (mark.run % COLORS));
      context.setLineDash(mark.kind ? [5 * scale, 3 * scale] : [scale, 2 * scale]);
      context.beginPath();
      context.moveTo(x, box.top);
      context.lineTo(x, box.top + box.height);
      context.stroke();
      if (!mark.kind) continue;
      const row = taken.filter((other) => Math.abs(other - x) < 11 * scale).length;
      taken.push(x);
      context.fillText(LETTERS[mark.kind], x + 7 * scale, box.top + (10 + 11 * row) * scale);
    }
    if (view.chart.zero && view.chart.lines.length) {
      const y = u.valToPos(0, "y", true);
      context.strokeStyle = color("--soft");
      context.setLineDash([]);
      context.beginPath();
      if (y > box.top && y < box.top + box.height) context.moveTo(box.left, y), context.lineTo(box.left + box.width, y);
      context.stroke();
    }
    context.restore();
  }

  function hovered(view, u) {
    const write = writer(view.chart.unit), left = u.cursor.left;
    const inside = left >= 0 && u.cursor.idx != null;
    view.lines.forEach((line, i) => {
      const index = inside ? u.cursor.idxs[i + 1] : null, value = index == null ? null : u.data[i + 1][index];
      view.outputs.get(line).textContent = value == null ? "" : write(value, 6);
    });
    let text = inside ? `${axis === "t" ? "tokens" : "step"} ${counted(u.posToVal(left, "x"), 5)}` : "";
    if (inside)
      for (const mark of marksOf(view))
        if (Math.abs(u.valToPos(mark[axis], "x") - left) < 7) text += `; ${data.runs[mark.run]}: ${mark.text}`;
    view.at.textContent = text;
  }

  function zoomAll(view, u, key) {
    if (key !== "x" || zooming || !view.ready) return;
    zooming = true;
    const { min, max } = u.scales.x;
    for (const other of views)
      if (other !== view && other.plot && (other.axis === view.axis)) other.plot.setScale("x", { min, max });
    zooming = false;
  }

  function size(view) {
    const width = Math.max(200, view.box.clientWidth);
    return { width, height: view.chart.wide ? Math.min(380, Math.max(260, width * 0.5)) : Math.min(260, Math.max(210, width * 0.6)) };
  }

  function draw(view) {
    const [lines, table] = aligned(view), write = writer(view.chart.unit);
    const scale = view.plot && !view.fresh ? { ...view.plot.scales.x } : null;
    view.ready = false;
    view.fresh = false;
    view.lines = lines;
    view.axis = axis === "s" && lines.every((line) => line.s) ? "s" : "t";
    if (view.plot) view.plot.destroy();
    const ink = () => color("--soft"), grid = { stroke: () => color("--grid"), width: 1 }, ticks = { ...grid, size: 4 };
    view.plot = new uPlot({
      ...size(view),
      scales: { x: { time: false, range: (u, min, max) => (min === max ? [min * 0.9, max * 1.1 || 1] : [min, max]) },
        y: { distr: view.log ? 3 : 1 } },
      legend: { show: false },
      cursor: { sync: { key: "report", scales: ["x", null] }, dataIdx: nearest, drag: { x: true, y: true, uni: 24 },
        points: { size: 7 } },
      axes: [
        { stroke: ink, grid, ticks, space: 60, values: (u, ticks) => ticks.map((one) => counted(one)), size: 30,
          label: view.axis === "t" ? "consumed tokens" : "steps", labelSize: 18, labelFont: "12px system-ui, sans-serif" },
        { stroke: ink, grid, ticks, size: 58, values: (u, ticks) => ticks.map((one) => (one == null ? "" : write(one, 4))) },
      ],
      series: [{}, ...lines.map(seriesOf)],
      hooks: { draw: [(u) => drawMarks(view, u)], setCursor: [(u) => hovered(view, u)], setScale: [(u, key) => zoomAll(view, u, key)] },
    }, table, view.box);
    if (scale && scale.min != null && view.axis === view.lastAxis) view.plot.setScale("x", scale);
    view.lastAxis = view.axis;
    view.ready = true;
  }

  function element(tag, parent, text = "", kind = "") {
    const made = document.createElement(tag);
    made.textContent = text;
    made.className = kind;
    parent.append(made);
    return made;
  }

  function legendEntry(view, line) {
    const row = element("div", view.legend);
    const sign = element("i", row, line.style === "dots" ? SHAPES[line.shape % 5] : line.style === "raw" ? "┄" : "━");
    element("span", row, line.name);
    view.outputs.set(line, element("output", row));
    view.rows.set(line, row);
    row.onclick = () => {
      line.shown = !line.shown;
      refresh(view);
    };
    return sign;
  }

  function refresh(view) {
    draw(view);
    for (const line of view.chart.lines) {
      if (!view.rows.has(line)) {
        if (!line.shown) continue;
        view.signs.set(line, legendEntry(view, line));
      }
      view.signs.get(line).style.color = lineColor(line);
      view.rows.get(line).className = isShown(line) ? "" : "off";
    }
    for (const row of document.querySelectorAll("tr[data-line]"))
      row.className = views.some((one) => one.chart.lines.some((line) => line.name === row.dataset.line && line.shown)) ? "on" : "";
  }

  function build(figure) {
    const chart = data.charts[Number(figure.dataset.chart)];
    const head = element("header", figure);
    element("b", head, chart.title);
    const view = { chart, log: chart.log, outputs: new Map(), rows: new Map(), signs: new Map(), plot: null,
      runs: new Set(chart.lines.map((line) => line.run)) };
    const log = element("button", head, "log", chart.log ? "on" : "");
    log.title = "logarithmic axis";
    log.onclick = () => {
      view.log = !view.log;
      log.className = view.log ? "on" : "";
      refresh(view);
    };
    view.box = element("div", figure);
    view.legend = element("div", figure, "", "legend");
    view.at = element("div", view.legend, "", "at");
    if (chart.about) element("p", figure, chart.about);
    views.push(view);
    refresh(view);
    new ResizeObserver(() => view.plot.setSize(size(view))).observe(view.box);
  }

  function buildBar() {
    const bar = document.getElementById("bar");
    data.runs.forEach((name, number) => {
      const button = element("button", bar);
      const sign = element("span", button, "━ ");
      button.append(name);
      button.title = "hide or show this run in all plots";
      button.onclick = () => {
        hidden.has(number) ? hidden.delete(number) : hidden.add(number);
        button.className = hidden.has(number) ? "off" : "";
        views.forEach(refresh);
      };
      recolor.push(() => (sign.style.color = color("--c" + (number % COLORS))));
    });
    const over = element("button", bar, "over steps");
    over.onclick = () => {
      axis = axis === "t" ? "s" : "t";
      over.className = axis === "s" ? "on" : "";
      views.forEach(refresh);
    };
    element("button", bar, "whole").onclick = () => {
      views.forEach((view) => (view.fresh = true));
      views.forEach(refresh);
    };
    const kinds = [...new Set(data.marks.map((mark) => mark.kind))];
    if (kinds.length) element("span", bar, kinds.map((kind) => `${LETTERS[kind]} ${kind}`).join(", "), "note");
  }

  const recolor = [];
  buildBar();
  document.querySelectorAll("figure.chart").forEach(build);
  const repaint = () => (recolor.forEach((paint) => paint()), views.forEach(refresh));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);
  recolor.forEach((paint) => paint());
  for (const row of document.querySelectorAll("tr[data-line]"))
    row.onclick = () => {
      const lines = views.flatMap((view) => view.chart.lines.filter((line) => line.name === row.dataset.line));
      const show = !lines.every((line) => line.shown);
      lines.forEach((line) => (line.shown = show));
      views.filter((view) => view.chart.lines.some((line) => lines.includes(line))).forEach(refresh);
    };
  window.report = { views, data };
  document.documentElement.dataset.drawn = views.length;
})();
