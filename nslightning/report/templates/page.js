"use strict";
// Draws the figures whose data the page carries, again when the page's width or its light changes.
(() => {
  const { specs, figures } = JSON.parse(document.getElementById("figures").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");

  // Columns travel as lists; texts as the list of distinct ones and a position in it per row.
  const decode = (columns) => {
    const lists = Object.entries(columns).map(([name, c]) => [name, c.codes ? c.codes.map((i) => c.values[i]) : c]);
    return lists[0][1].map((_, row) => Object.fromEntries(lists.map(([name, list]) => [name, list[row]])));
  };

  const look = (width, extent, longest) => {
    const [ink, quiet, grid] = dark.matches ? ["#e6e9ec", "#a3adb8", "#2b333c"] : ["#1c2733", "#5b6875", "#e3e8ed"];
    const font = 'system-ui, "Segoe UI", Helvetica, Arial, sans-serif';
    return {
      background: null, font,
      view: { stroke: null },
      axis: { labelColor: quiet, titleColor: quiet, gridColor: grid, domainColor: grid, tickColor: grid,
              labelFontSize: 11, titleFontSize: 12, titleFontWeight: "normal" },
      axisX: { grid: false, labelSeparation: 8 },
      axisXQuantitative: { tickCount: Math.max(3, Math.round(width / 110)) },
      axisY: { minExtent: extent, maxExtent: extent, labelLimit: extent },
      header: { labelColor: ink, labelFontSize: 12, labelFontWeight: 600, labelLimit: width - extent },
      text: { color: quiet },
      // At the right of the legend stands the button that saves the figure.
      legend: { orient: "top", direction: "horizontal",
                columns: Math.max(1, Math.floor((width - extent - 40) / (45 + 7 * longest))),
                layout: { top: { anchor: "start", direction: "vertical" } }, labelLimit: 300,
                gradientLength: Math.min(240, width - extent - 40), labelColor: ink, titleColor: quiet,
                titleFontWeight: "normal", labelFontSize: 12, symbolStrokeWidth: 2 },
    };
  };

  // A name that fits into a number of letters. Its parts become their first letter and their digits, from the left on, as
  // far as needed: encoder.stage0.12.attention is e.s0.12.attention. A name that is longer even so loses its beginning.
  const shortened = (name, letters) => {
    const parts = name.split(/([.:])/);
    for (let i = 0; i < parts.length - 1 && parts.join("").length > letters; i += 2) {
      parts[i] = parts[i].replace(/^([A-Za-z])\D*(\d*)$/, "$1$2");
    }
    const short = parts.join("");
    return short.length > letters ? `…${short.slice(1 - letters)}` : short;
  };

  // Adjusts a spec to its rows: one colour and shape for one name in all parts; no legend that tells nothing apart;
  // names that fit beside the axis; rows that are as high as the page has room for.
  const settle = (view, rows, figure, letters) => {
    for (const part of [...(view.vconcat ?? []), ...(view.layer ?? [])]) settle(part, rows, figure, letters);
    for (const [channel, encoding] of Object.entries(view.encoding ?? {})) {
      if (!encoding?.field) continue;
      const values = [...new Set(rows.map((row) => row[encoding.field]))];
      if (["color", "shape"].includes(channel) && encoding.type === "nominal") {
        encoding.scale ??= { domain: values };
        if (encoding.legend !== null) encoding.legend = { ...encoding.legend, values: encoding.scale.domain.filter((v) => values.includes(v)) };
      }
      if (["strokeDash", "strokeWidth"].includes(channel) && values.length < 2) encoding.legend = null;
      if (channel === "x" && encoding.title === "") encoding.title = figure.axis;
      if (["y", "yOffset"].includes(channel) && encoding.type === "nominal") encoding.sort = values; // also where a layer lacks some
      if (channel === "y" && encoding.type === "nominal" && encoding.axis !== null) {
        encoding.axis = { ...encoding.axis, labelExpr: "shortened[datum.label]", labelOverlap: true };
        for (const name of values) figure.shortened[name] = shortened(String(name), letters);
        if (view.height?.step && view.height.for !== "offset") view.height.step = Math.max(3, Math.min(view.height.step, 1000 / values.length));
      }
    }
    const colour = view.encoding?.color;
    if (colour?.type === "quantitative" && !rows.some((row) => row.relative > 0 || row.fraction > 0)) colour.legend = null;
  };

  const shown = (figure) => {
    let rows = figure.rows.filter((row) => figure.chosen.every(([column, value]) => value === null || row[column] === value));
    if (figure.first && !figure.all) {
      const [column, count] = figure.first;
      const kept = new Set([...new Set(rows.map((row) => row[column]))].slice(0, count));
      rows = rows.filter((row) => kept.has(row[column]));
    }
    return rows;
  };

  const draw = (figure) => {
    const place = document.getElementById(figure.id);
    const width = place.clientWidth;
    const extent = Math.round(Math.min(figure.extent, 0.36 * width));
    const spec = structuredClone(specs[figure.spec]);
    const rows = shown(figure);
    const longest = Math.max(...rows.map((row) => Math.max(...["label", "series", "name"].map((c) => row[c]?.length ?? 0))));
    const strip = figure.spec === "dots" ? 44 : 0; // left and right of the axis
    if (spec.height?.for === "offset") spec.height.step = Math.max(spec.height.step, 20 / new Set(rows.map((row) => row.series)).size);
    const inner = Math.max(120, width - extent - 24 - strip);
    for (const view of spec.vconcat ?? [spec]) view.width = inner;
    if (spec.vconcat && rows.every((row) => row.value > 0 && row.value < Infinity)) spec.vconcat.length = 1;
    spec.datasets = { wandb: rows };
    spec.description = `${figure.alt} ${spec.description}`;
    delete spec.$schema;
    figure.shortened = {};
    settle(spec, rows, figure, Math.max(6, Math.floor(extent / 6.2)));
    spec.params = [...(spec.params ?? []), { name: "shortened", value: figure.shortened }];
    vegaEmbed(place, spec, {
      mode: "vega-lite", logLevel: 1, renderer: rows.length > 3000 ? "canvas" : "svg", config: look(width, extent, longest), tooltip: { theme: dark.matches ? "dark" : "light" },
      actions: { export: true, source: false, compiled: false, editor: false },
    }).then(({ view }) => {
      place.querySelector("summary")?.setAttribute("aria-label", "Save this figure");
      // vega-embed makes the image when a mouse button goes down on the link; a keyboard presses Enter.
      for (const link of place.querySelectorAll(".vega-actions a")) {
        link.addEventListener("keydown", async (event) => {
          if (event.key !== "Enter") return;
          event.preventDefault();
          link.href = await view.toImageURL(link.download.endsWith("svg") ? "svg" : "png");
          link.click();
        });
      }
    }).catch((error) => { place.textContent = `This figure could not be drawn: ${error.message}`; });
  };

  // A labelled list of values; the change redraws the figure.
  const control = (figure, name, options, change) => {
    const select = document.createElement("select");
    select.append(...options.map(([text, value, selected]) => new Option(text, value, false, selected)));
    select.addEventListener("change", () => { change(options[select.selectedIndex][1]); draw(figure); });
    const label = document.createElement("label");
    label.append(`${name} `, select);
    document.getElementById(`${figure.id}-choose`).append(label);
  };

  const distinct = (figure, column) => [...new Set(figure.rows.map((row) => row[column]))];

  for (const figure of figures) {
    figure.rows = decode(figure.columns);
    const best = figure.rows.find((row) => row.relative > 0) ?? figure.rows[0]; // something to see
    figure.chosen = [...figure.choose.map((column) => [column, best[column]]), ...(figure.focus ? [[figure.focus, null]] : [])];
    for (const pair of figure.chosen) {
      const values = distinct(figure, pair[0]);
      if (values.length < 2) continue;
      const names = { name: "run", series: "show", label: "show" };
      const all = pair[1] === null ? [["all", null, true]] : [];
      control(figure, names[pair[0]] ?? pair[0], [...all, ...values.map((v) => [v, v, v === pair[1]])], (value) => { pair[1] = value; });
    }
    if (figure.first && distinct(figure, figure.first[0]).length > figure.first[1]) {
      const count = distinct(figure, figure.first[0]).length;
      const options = [[`the first ${figure.first[1]}`, false, true], [`all ${count}`, true, false]];
      control(figure, "show", options, (value) => { figure.all = value; });
    }
    draw(figure);
  }

  let width = innerWidth, waiting;
  const again = () => figures.forEach(draw);
  dark.addEventListener("change", again);
  addEventListener("resize", () => {
    if (innerWidth === width) return; // a phone's address bar comes and goes
    width = innerWidth;
    clearTimeout(waiting);
    waiting = setTimeout(again, 150);
  });
})();
