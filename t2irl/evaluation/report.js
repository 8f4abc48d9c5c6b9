"use strict";
(() => {
  // Curves: the values under the pointer stand in the legend.
  const place = (value, low, high, from, to) => from + ((value - low) / (high - low)) * (to - from);
  for (const figure of document.querySelectorAll("figure[data-chart]")) {
    const chart = JSON.parse(figure.dataset.chart);
    const [left, top, right, bottom] = chart.box;
    const svg = figure.querySelector("svg");
    const values = [...figure.querySelectorAll("output")];
    const newest = values.map((value) => value.textContent);
    const at = figure.querySelector(".at");
    const cursor = document.createElementNS("http://www.w3.org/2000/svg", "line");
    cursor.setAttribute("class", "cursor");
    cursor.setAttribute("y1", top);
    cursor.setAttribute("y2", bottom);
    svg.addEventListener("pointermove", (event) => {
      const area = svg.getBoundingClientRect();
      const x = ((event.clientX - area.left) / area.width) * svg.viewBox.baseVal.width;
      const wanted = Math.min(Math.max(place(x, left, right, 0, chart.last), 0), chart.last);
      let nearest = 0;
      chart.series.forEach((series, k) => {
        const point = series.points.reduce((a, b) => (Math.abs(b[0] - wanted) < Math.abs(a[0] - wanted) ? b : a));
        values[k].textContent = String(Number(point[1].toPrecision(chart.digits)));
        nearest = k === 0 ? point[0] : nearest;
      });
      cursor.setAttribute("x1", place(nearest, 0, chart.last, left, right));
      cursor.setAttribute("x2", place(nearest, 0, chart.last, left, right));
      svg.append(cursor);
      at.textContent = `iteration ${Math.round(nearest)}`;
    });
    svg.addEventListener("pointerleave", () => {
      values.forEach((value, k) => (value.textContent = newest[k]));
      cursor.remove();
      at.textContent = "";
    });
  }

  // Pictures: the slider chooses the right-hand side of every pair.
  const frames = JSON.parse(document.getElementById("frames").textContent);
  const slider = document.getElementById("frame");
  const text = (score) => (score === null || score === undefined ? "n/a" : score.toFixed(2));
  const show = (k) => {
    const frame = frames[k];
    document.getElementById("sheets").sheet.cssRules[1].style.backgroundImage = `url("${frame.sheet}")`;
    for (const label of document.querySelectorAll(".shown")) label.textContent = frame.iteration;
    for (const pair of document.querySelectorAll(".pair")) {
      const n = Number(pair.dataset.picture);
      for (const cell of pair.querySelectorAll("[data-measure]")) {
        const name = cell.dataset.measure;
        const [before, now] = [frames[0].scores[name], frame.scores[name]].map((scores) => (scores ? scores[n] : null));
        cell.textContent = text(now);
        const change = before === null || now === null ? 0 : now - before;
        cell.className = change > 0.005 ? "up" : change < -0.005 ? "down" : "";
      }
    }
  };
  if (slider) {
    const play = document.getElementById("play");
    let timer = 0;
    const stop = () => {
      clearInterval(timer);
      timer = 0;
      play.textContent = "Play";
    };
    slider.addEventListener("input", () => (stop(), show(Number(slider.value))));
    play.addEventListener("click", () => {
      if (timer) return stop();
      play.textContent = "Pause";
      if (Number(slider.value) === frames.length - 1) slider.value = 0;
      show(Number(slider.value));
      timer = setInterval(() => {
        slider.value = Number(slider.value) + 1;
        show(Number(slider.value));
        if (Number(slider.value) === frames.length - 1) stop();
      }, 700);
    });
    show(frames.length - 1);
  }
  for (const button of document.querySelectorAll(".card button")) {
    button.addEventListener("click", () => {
      const open = button.closest(".card").classList.toggle("large");
      button.setAttribute("aria-expanded", String(open));
    });
  }

  for (const button of document.querySelectorAll(".copy")) {
    button.addEventListener("click", async () => {
      const code = button.parentElement.querySelector("code");
      const range = document.createRange();
      range.selectNodeContents(code);
      getSelection().removeAllRanges();
      getSelection().addRange(range); // so that the keyboard can copy where a page from disk may not
      const copied = navigator.clipboard?.writeText(code.textContent).then(() => true, () => false);
      button.textContent = (await copied) ? "Copied" : "Selected";
    });
  }

  // Glossary: a link opens the entry; an explanation closes when something else is used.
  const open = () => {
    const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (target && target.tagName === "DETAILS") target.open = true;
  };
  addEventListener("hashchange", open);
  open();
  document.addEventListener("click", (event) => {
    for (const info of document.querySelectorAll("details.info[open]")) {
      if (!info.contains(event.target) || event.target.tagName === "A") info.open = false;
    }
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") for (const info of document.querySelectorAll("details.info[open]")) info.open = false;
  });
})();
