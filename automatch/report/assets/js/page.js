// The page on its own: decisions are kept in this browser, and leave it as mapping.json.
function startPage() {
  const root = document.querySelector(".am");
  const data = JSON.parse(document.querySelector(".am-data").textContent);
  const place = `automatch:${data.sides.map((side) => side.fingerprint).join(":")}`;
  const memory = {
    get: (name) => {
      try {
        return localStorage.getItem(name);
      } catch {
        return null;
      }
    },
    set: (name, value) => {
      try {
        localStorage.setItem(name, value);
      } catch {
        /* a browser may forbid it; the decisions then live as long as the page */
      }
    },
  };
  const applyTheme = (theme) => {
    if (theme) document.documentElement.dataset.theme = theme;
  };
  const dark = () =>
    (document.documentElement.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const serving = root.dataset.save;
  const host = {
    restore: () => {
      try {
        return JSON.parse(memory.get(place)) || {};
      } catch {
        return {};
      }
    },
    changed: (payload) => memory.set(place, JSON.stringify(payload)),
    theme: () => {
      const theme = dark() ? "light" : "dark";
      memory.set("automatch:theme", theme);
      applyTheme(theme);
    },
    save: (review) => (serving ? sendDecisions(serving, review) : downloadMapping(review)),
  };
  applyTheme(memory.get("automatch:theme"));
  const app = new App(root, data, host);
  document.addEventListener("keydown", (event) => event.target === document.body && app.onKey(event));
  addEventListener("beforeprint", () => app.list.printAll(true));
  addEventListener("afterprint", () => app.list.printAll(false));
  return app;
}

async function sendDecisions(address, review) {
  const body = JSON.stringify(review.payload());
  const answer = await fetch(address, { method: "POST", headers: { "Content-Type": "application/json" }, body });
  const { message } = await answer.json();
  if (!answer.ok) throw new Error(message);
  return message;
}

window.automatchReview = startPage();
