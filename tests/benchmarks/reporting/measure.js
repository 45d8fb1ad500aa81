// Run in a copy of a report at the end of its body; what it finds goes into an element of its own.
addEventListener("load", () => {
  const found = {
    errors: window.errors,
    tables: document.querySelectorAll("table").length,
    pictures: document.querySelectorAll("svg").length,
    texts: document.querySelectorAll("svg text").length,
    width: document.documentElement.scrollWidth,
    window: innerWidth,
    overlaps: [],
    outside: [],
    sorted: null,
  };
  for (const svg of document.querySelectorAll("svg")) {
    const name = svg.querySelector("title").textContent;
    const frame = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll("text")].filter((text) => text.textContent.trim());
    const boxes = texts.map((text) => text.getBoundingClientRect());
    boxes.forEach((a, i) => {
      if (a.left < frame.left - 1 || a.right > frame.right + 1 || a.top < frame.top - 1 || a.bottom > frame.bottom + 1) {
        found.outside.push(`${name}: ${texts[i].textContent}`);
      }
      boxes.slice(i + 1).forEach((b, j) => {
        // Boxes have the height of a line, taller than its letters: they may touch.
        const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
        const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
        if (across > 0.5 && down > 0.25 * Math.min(a.height, b.height)) {
          found.overlaps.push(`${name}: ${texts[i].textContent} and ${texts[i + 1 + j].textContent}`);
        }
      });
    });
  }
  const table = document.querySelector("figure.table table");
  if (table) {
    const column = table.tHead.rows[0].cells.length - 1;
    table.tHead.rows[0].cells[column].querySelector("button").click();
    found.sorted = [...table.tBodies[0].rows].map((row) => row.cells[column].dataset.value);
  }
  const output = document.createElement("pre");
  output.id = "measured";
  output.textContent = JSON.stringify(found);
  // The page lies in a frame, which can be narrower than any window.
  parent.document.body.append(output);
});
