"use strict";

const nearest = (items, distance) =>
  items.reduce((best, item) => (best === null || distance(item) < distance(best) ? item : best), null);

// A line chart: a cross at the nearest point, with the values of all lines there.
function lines(figure) {
  const data = JSON.parse(figure.querySelector("script").textContent);
  const svg = figure.querySelector("svg");
  const tip = figure.appendChild(document.createElement("div"));
  tip.className = "tip";
  tip.hidden = true;
  const cross = svg.appendChild(document.createElementNS(svg.namespaceURI, "line"));
  cross.setAttribute("class", "cross");
  cross.setAttribute("y1", data.box[1]);
  cross.setAttribute("y2", data.box[3]);
  cross.style.display = "none";

  svg.addEventListener("pointermove", (event) => {
    const frame = svg.getBoundingClientRect();
    const x = ((event.clientX - frame.left) / frame.width) * data.size[0];
    const near = nearest(data.series.flatMap((line) => line.at), (point) => Math.abs(point[0] - x));
    cross.style.display = "";
    cross.setAttribute("x1", near[0]);
    cross.setAttribute("x2", near[0]);
    tip.textContent = near[2];
    data.series.forEach((line, position) => {
      const point = nearest(line.at, (candidate) => Math.abs(candidate[0] - near[0]));
      const row = tip.appendChild(document.createElement("div"));
      row.className = "s" + (position % 8);
      row.textContent = point ? line.name + ": " + point[3] : "";
    });
    tip.hidden = false;
    const room = figure.clientWidth - tip.offsetWidth - 4;
    tip.style.left = Math.max(0, Math.min((near[0] / data.size[0]) * frame.width + 10, room)) + "px";
    tip.style.top = "34px";
  });
  svg.addEventListener("pointerleave", () => {
    tip.hidden = true;
    cross.style.display = "none";
  });
}

// The embedding map: dots on a canvas, the image behind the dot nearest to the pointer beside it.
function map(figure) {
  const data = JSON.parse(figure.querySelector("script").textContent);
  const canvas = figure.querySelector("canvas");
  const thumb = figure.querySelector(".thumb");
  const words = figure.querySelector(".words");
  const names = figure.querySelector(".names");
  const present = [...new Set(data.points.map((point) => point[2]))].sort((a, b) => a - b);
  const named = present.length <= 60 ? present : []; // of more, the name of the chosen dot is shown
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const side = 96;
  let chosen = -1;
  let pointed = -1; // class under the pointer in the legend

  // Hues a golden angle apart stay distinct for any number of classes.
  const color = (label) => `hsl(${(label * 137.508) % 360} 65% ${dark.matches ? 62 : 45}%)`;
  const place = (point) => [(0.03 + 0.94 * point[0]) * canvas.width, (0.03 + 0.94 * point[1]) * canvas.height];

  function draw() {
    const context = canvas.getContext("2d");
    context.clearRect(0, 0, canvas.width, canvas.height);
    const strong = pointed >= 0 ? pointed : chosen >= 0 ? data.points[chosen][2] : -1;
    data.points.forEach((point, position) => {
      const [x, y] = place(point);
      context.fillStyle = color(point[2]);
      context.globalAlpha = strong >= 0 && point[2] !== strong ? 0.25 : 0.9;
      context.beginPath();
      context.arc(x, y, position === chosen ? 9 : 5, 0, 2 * Math.PI);
      context.fill();
    });
    context.globalAlpha = 1;
  }

  function label() {
    names.replaceChildren(
      ...named.map((name) => {
        const entry = document.createElement("span");
        entry.appendChild(document.createElement("i")).style.background = color(name);
        entry.append(data.classes[name]);
        entry.addEventListener("pointerenter", () => { pointed = name; draw(); });
        entry.addEventListener("pointerleave", () => { pointed = -1; draw(); });
        return entry;
      }),
    );
  }

  function show(position) {
    chosen = position;
    const point = data.points[position];
    const column = position % data.columns;
    const row = Math.floor(position / data.columns);
    thumb.style.background = `url(${data.sprite}) ${-column * side}px ${-row * side}px / ${data.columns * side}px auto`;
    words.textContent = data.classes[point[2]] + " · " + point[3];
    figure.dataset.chosen = position;
    draw();
  }

  function point(event) {
    const frame = canvas.getBoundingClientRect();
    const x = ((event.clientX - frame.left) / frame.width) * canvas.width;
    const y = ((event.clientY - frame.top) / frame.height) * canvas.height;
    const distance = (position) => {
      const [u, v] = place(data.points[position]);
      return (u - x) ** 2 + (v - y) ** 2;
    };
    const best = nearest([...data.points.keys()], distance);
    if (best !== null && distance(best) < 40 * 40) show(best);
  }

  canvas.addEventListener("pointermove", point);
  canvas.addEventListener("pointerdown", point);
  dark.addEventListener("change", () => { label(); draw(); });
  label();
  draw();
}

document.querySelectorAll("figure[data-kind=lines]").forEach(lines);
document.querySelectorAll("figure[data-kind=map]").forEach(map);
document.documentElement.dataset.ready = "yes";
