(function () {
  "use strict";
  var table = document.getElementById("pair-table");
  var body = table.tBodies[0];
  var rows = Array.prototype.slice.call(body.rows);
  var buttons = Array.prototype.slice.call(table.tHead.querySelectorAll("button"));
  var text = document.getElementById("filter-text");
  var kind = document.getElementById("filter-kind");
  var outcome = document.getElementById("filter-outcome");

  function filter() {
    var wanted = text.value.trim().toLowerCase();
    var count = 0;
    rows.forEach(function (row) {
      var words = row.querySelector("th").textContent.toLowerCase();
      var fits = words.indexOf(wanted) >= 0 &&
        (!kind.value || row.dataset.kind === kind.value) &&
        (!outcome.value || row.dataset.outcome === outcome.value);
      row.hidden = !fits;
      if (fits) { count += 1; }
    });
    document.getElementById("shown").textContent = count + " of " + rows.length + " pairs";
    document.getElementById("nothing").hidden = count > 0;
  }

  function sort(button) {
    var head = button.parentElement;
    var numeric = Boolean(button.dataset.numeric);
    var key = button.dataset.key;
    // Numbers start with the largest: the most similar picture is what a reader looks for.
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
  window.addEventListener("beforeprint", function () {
    document.querySelectorAll("details").forEach(function (part) { part.open = true; });
  });
})();
