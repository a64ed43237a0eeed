(function () {
  "use strict";
  function list(found) { return Array.prototype.slice.call(found); }

  function setUp(block) {
    var table = block.querySelector("table.pairs");
    var body = table.tBodies[0];
    var rows = list(body.rows);
    var buttons = list(table.tHead.querySelectorAll("button"));
    function part(name) { return block.querySelector('[data-filter="' + name + '"]'); }
    var text = part("text"), kind = part("kind"), outcome = part("outcome");

    function filter() {
      var wanted = text.value.trim().toLowerCase();
      var count = 0;
      rows.forEach(function (row) {
        var words = row.querySelector("th").textContent.toLowerCase();
        var fits = words.indexOf(wanted) >= 0 &&
          (!kind.value || row.dataset.kind === kind.value) &&
          (!outcome.value || row.dataset.outcome.split(" ").indexOf(outcome.value) >= 0);
        row.hidden = !fits;
        if (fits) { count += 1; }
      });
      part("shown").textContent = count + " of " + rows.length + " pairs";
      part("nothing").hidden = count > 0;
    }

    function sort(button) {
      var head = button.parentElement;
      var numeric = Boolean(button.dataset.numeric);
      var key = button.dataset.key;
      // Numbers start with the largest: the most similar image is what a reader looks for.
      var before = head.getAttribute("aria-sort");
      var next = before === "none" ? (numeric ? "descending" : "ascending") :
        before === "ascending" ? "descending" : "ascending";
      buttons.forEach(function (other) { other.parentElement.setAttribute("aria-sort", "none"); });
      head.setAttribute("aria-sort", next);
      var sign = next === "ascending" ? 1 : -1;
      rows.map(function (row, place) { return { row: row, place: place, value: row.dataset[key] }; })
        .sort(function (a, b) {
          var order = numeric ? Number(a.value) - Number(b.value) :
            a.value.localeCompare(b.value, "en", { numeric: true });
          return sign * order || a.place - b.place;
        })
        .forEach(function (item) { body.appendChild(item.row); });
    }

    buttons.forEach(function (button) {
      button.addEventListener("click", function () { sort(button); });
    });
    text.addEventListener("input", filter);
    kind.addEventListener("change", filter);
    outcome.addEventListener("change", filter);
    // A browser keeps the fields of a reloaded page: the table must agree with them.
    filter();
  }

  list(document.querySelectorAll("[data-pairs]")).forEach(setUp);
  window.addEventListener("beforeprint", function () {
    // Paper has no fold: what would be shown when scrolled to must be there now.
    list(document.images).forEach(function (image) {
      image.loading = "eager";
      image.decoding = "sync";
    });
    list(document.querySelectorAll("details")).forEach(function (part) { part.open = true; });
  });
})();
