"use strict";

// The samples, one step at a time: of each run the last one that is not after the step of the slider.
const slider = document.getElementById("step");
if (slider) {
  const runs = [...document.querySelectorAll(".samples")];
  const steps = [...new Set([...document.querySelectorAll(".samples li")].map((li) => Number(li.dataset.step)))];
  steps.sort((a, b) => a - b);
  const show = () => {
    const step = steps[slider.value];
    document.getElementById("shown").value = step;
    slider.setAttribute("aria-valuetext", `step ${step}`);
    for (const run of runs) {
      const items = [...run.querySelectorAll("li")];
      const current = items.findLast((li) => Number(li.dataset.step) <= step) ?? items[0];
      for (const li of items) li.classList.toggle("current", li === current);
      run.classList.add("single");
    }
  };
  slider.max = steps.length - 1;
  slider.value = slider.max;
  slider.addEventListener("input", show);
  slider.parentElement.hidden = steps.length < 2;
  show();
}

// The values of a chart at the step under the pointer, or moved to with the arrow keys; else the last ones.
const WIDTH = 460, LEFT = 56, RIGHT = 10;
for (const chart of document.querySelectorAll(".chart")) {
  const series = JSON.parse(chart.querySelector("script").textContent);
  const outputs = chart.querySelectorAll(".legend output");
  const at = chart.querySelector(".at");
  const steps = [...new Set(series.flatMap((s) => s.steps))].sort((a, b) => a - b);
  const nearest = (list, value) =>
    list.reduce((best, x, i) => (Math.abs(x - value) < Math.abs(list[best] - value) ? i : best), 0);
  const text = (value) => (value === null ? "\u2013" : String(Number(value.toPrecision(4))));
  let index = null;

  const show = (next) => {
    index = next;
    at.value = index === null ? "" : `step ${steps[index]}`;
    series.forEach((s, i) => {
      const known = index === null ? s.values.filter((v) => v !== null) : [s.values[nearest(s.steps, steps[index])]];
      outputs[i].value = text(known.at(-1));
    });
    for (const svg of chart.querySelectorAll("svg[data-first]")) {
      svg.querySelector(".cross")?.remove();
      if (index === null) continue;
      const first = Number(svg.dataset.first), last = Number(svg.dataset.last);
      const x = LEFT + ((steps[index] - first) / (last - first)) * (WIDTH - LEFT - RIGHT);
      const line = document.createElementNS("http://www.w3.org/2000/svg", "path");
      line.setAttribute("class", "cross");
      line.setAttribute("d", `M${x} 8V202`);
      svg.append(line);
    }
  };

  for (const svg of chart.querySelectorAll("svg[data-first]")) {
    svg.setAttribute("tabindex", "0");
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * WIDTH;
      const first = Number(svg.dataset.first), last = Number(svg.dataset.last);
      show(nearest(steps, first + ((x - LEFT) / (WIDTH - LEFT - RIGHT)) * (last - first)));
    });
    svg.addEventListener("pointerleave", () => show(null));
    svg.addEventListener("blur", () => show(null));
    svg.addEventListener("keydown", (event) => {
      const moves = { ArrowLeft: -1, ArrowRight: 1, Home: -steps.length, End: steps.length };
      if (!(event.key in moves)) return;
      event.preventDefault();
      const from = index ?? (event.key === "ArrowRight" ? -1 : steps.length);
      show(Math.min(Math.max(from + moves[event.key], 0), steps.length - 1));
    });
  }
}

const theme = document.getElementById("theme");
theme.hidden = false;
theme.addEventListener("click", () => {
  const root = document.documentElement;
  const isDark = root.dataset.theme
    ? root.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = isDark ? "light" : "dark";
});
