// Uses a report as a reader would, and writes what came of it to the element `answer`.
addEventListener("load", () => {
  const answer = { errors: window.errors, drawn: +document.documentElement.dataset.drawn };
  const { views } = window.report, view = views[0], over = view.box.querySelector(".u-over"), at = over.getBoundingClientRect();
  const mouse = (kind, x, y, where = over) => where.dispatchEvent(new MouseEvent(kind, { bubbles: true, button: 0, movementX: 9,
    clientX: at.left + x * at.width, clientY: at.top + y * at.height }));
  answer.overflow = document.documentElement.scrollWidth - innerWidth;
  answer.cut = [...document.querySelectorAll("p, td, .legend div")].filter((one) => one.offsetParent &&
    !one.closest("details") && one.scrollWidth > one.clientWidth + 1).map((one) => one.textContent.slice(0, 60));
  const whole = { ...view.plot.scales.x }, others = () => views.map((one) => one.plot.scales.x.max);
  answer.whole = [whole.min, whole.max];
  mouse("mousemove", 0.5, 0.5);
  setTimeout(() => {
    answer.hover = [...view.legend.querySelectorAll("output")].map((one) => one.textContent).filter(Boolean).length;
    mouse("mousedown", 0.25, 0.5);
    mouse("mousemove", 0.75, 0.5);
    setTimeout(() => mouse("mouseup", 0.75, 0.5, document), 200);
    setTimeout(() => {
      answer.zoomed = [view.plot.scales.x.min, view.plot.scales.x.max];
      answer.together = Math.max(...others()) - Math.min(...others());
      view.box.parentElement.querySelector("header button").click();
      answer.log = view.plot.scales.y.distr;
      document.querySelectorAll("#bar button")[1].click();
      const shows = (run) => views.some((one) => one.lines.some((line, i) => line.run === run && one.plot.series[i + 1].show));
      answer.shown = [shows(0), shows(1)];
      const row = [...document.querySelectorAll("tr[data-line]")].at(-1), before = views.flatMap((one) => one.lines).length;
      if (row) row.click();
      answer.added = views.flatMap((one) => one.lines).length - before;
      const pre = document.createElement("pre");
      pre.id = "answer";
      pre.textContent = JSON.stringify(answer);
      document.body.append(pre);
    }, 500);
  }, 300);
});
