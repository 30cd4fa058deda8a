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
      axisX: { grid: false },
      axisXQuantitative: { tickCount: Math.max(3, Math.round(width / 110)) },
      axisY: { minExtent: extent, maxExtent: extent, labelLimit: extent - 8 },
      header: { labelColor: ink, labelFontSize: 12, labelFontWeight: 600 },
      legend: { orient: "top", direction: "horizontal", columns: Math.max(1, Math.floor(width / (45 + 7 * longest))),
                layout: { top: { anchor: "start", direction: "vertical" } }, labelLimit: 300,
                gradientLength: Math.min(240, width - extent - 40), labelColor: ink, titleColor: quiet,
                titleFontWeight: "normal", labelFontSize: 12, symbolStrokeWidth: 2 },
    };
  };

  // One colour and shape for one name in all parts of a figure; a legend that tells nothing apart is left out.
  const settle = (view, rows) => {
    for (const part of [...(view.vconcat ?? []), ...(view.layer ?? [])]) settle(part, rows);
    for (const [channel, encoding] of Object.entries(view.encoding ?? {})) {
      const values = [...new Set(rows.map((row) => row[encoding.field]))];
      if (["color", "shape"].includes(channel) && encoding.type === "nominal") encoding.scale ??= { domain: values };
      if (["strokeDash", "strokeWidth"].includes(channel) && values.length < 2) encoding.legend = null;
    }
    const colour = view.encoding?.color;
    if (colour?.type === "quantitative" && !rows.some((row) => row.relative > 0 || row.fraction > 0)) colour.legend = null;
  };

  const draw = (figure) => {
    const place = document.getElementById(figure.id);
    const width = place.clientWidth;
    const extent = Math.round(Math.min(figure.extent, 0.36 * width));
    const spec = structuredClone(specs[figure.spec]);
    const rows = figure.rows.filter((row) => figure.chosen.every(([column, value]) => row[column] === value));
    const longest = Math.max(...rows.map((row) => Math.max(...["label", "series", "name"].map((c) => row[c]?.length ?? 0))));
    const inner = Math.max(120, width - extent - 24);
    for (const view of spec.vconcat ?? [spec]) view.width = inner;
    if (spec.vconcat && rows.every((row) => row.value > 0 && row.value < Infinity)) spec.vconcat.length = 1;
    spec.datasets = { wandb: rows };
    delete spec.$schema;
    settle(spec, rows);
    vegaEmbed(place, spec, {
      mode: "vega-lite", logLevel: 1, renderer: rows.length > 3000 ? "canvas" : "svg", config: look(width, extent, longest), tooltip: { theme: dark.matches ? "dark" : "light" },
      actions: { export: true, source: false, compiled: false, editor: false },
    }).catch((error) => { place.textContent = `This figure could not be drawn: ${error.message}`; });
  };

  for (const figure of figures) {
    figure.rows = decode(figure.columns);
    const first = figure.rows.find((row) => row.relative > 0) ?? figure.rows[0]; // something to see
    figure.chosen = figure.choose.map((column) => [column, first[column]]);
    const controls = document.getElementById(`${figure.id}-choose`);
    for (const pair of figure.chosen) {
      const values = [...new Set(figure.rows.map((row) => row[pair[0]]))];
      if (values.length < 2) continue;
      const select = document.createElement("select");
      select.append(...values.map((value) => new Option(value, value, false, value === pair[1])));
      select.addEventListener("change", () => { pair[1] = select.value; draw(figure); });
      const label = document.createElement("label");
      label.append(`${pair[0] === "name" ? "run" : pair[0]} `, select);
      controls.append(label);
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
