// The page inside a notebook: every decision goes to Python at once.
function render({ model, el }) {
  el.innerHTML = model.get("_html");
  const host = {
    restore: () => model.get("decisions"),
    changed: (payload) => {
      model.set("decisions", payload);
      model.save_changes();
    },
    save: downloadMapping,
  };
  const app = new App(el.querySelector(".am"), JSON.parse(model.get("_data")), host);
  const refresh = () => app.restore(model.get("decisions"));
  const complain = () => app.say(model.get("error"));
  model.on("change:decisions", refresh);
  model.on("change:error", complain);
  return () => {
    model.off("change:decisions", refresh);
    model.off("change:error", complain);
  };
}

export default { render };
