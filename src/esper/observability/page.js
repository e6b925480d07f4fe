"use strict";
/* A run's page in time: what is served changes as events come, and every page goes back to any
   update. It makes no request but to where it came from, and a file makes none at all. */
(() => {
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("page-data").textContent);
  const bar = byId("time");
  const slider = byId("moment");
  const stop = "a[href], button, input, summary, [tabindex]";
  const latest = new Map(); // what stands now, by column: {order, html}
  let changes = data.changes;
  let states = data.states;
  let heard = data.heard;
  let follows = true;
  let away = false;
  let player = 0;
  let frames = null; // of a file, unpacked when first asked for

  for (const column of data.columns) {
    const html = Object.fromEntries(column.order.map((id) => [id, byId(id).outerHTML]));
    latest.set(column.id, { order: column.order, html });
  }

  function swap(old, html) {
    const box = document.createElement("template");
    box.innerHTML = html;
    const fresh = box.content.firstElementChild;
    const focused = [...old.querySelectorAll(stop)].indexOf(document.activeElement);
    const scrolled = [...old.querySelectorAll(".wide")].map((one) => one.scrollLeft);
    old.replaceWith(fresh);
    fresh.querySelectorAll(".wide").forEach((one, at) => { one.scrollLeft = scrolled[at] || 0; });
    if (focused >= 0) fresh.querySelectorAll(stop)[focused]?.focus({ preventScroll: true });
    return fresh;
  }

  const shown = new Map(); // the markup that each piece was last made of
  function show(columns) {
    for (const { id, order, html } of columns) {
      const column = byId(id);
      let place = column.firstElementChild;
      for (const piece of order) {
        let one = byId(piece);
        if (!one) {
          one = document.createElement("div");
          column.insertBefore(one, place);
          one = swap(one, html[piece]);
        } else {
          if (one === place) place = place.nextElementSibling;
          else column.insertBefore(one, place);
          if (shown.get(piece) !== html[piece]) one = swap(one, html[piece]);
        }
        shown.set(piece, html[piece]);
      }
      while (place) {
        const next = place.nextElementSibling;
        shown.delete(place.id);
        place.remove();
        place = next;
      }
    }
  }

  const showLatest = () => show([...latest].map(([id, column]) => ({ id, ...column })));
  for (const column of latest.values()) {
    for (const [id, html] of Object.entries(column.html)) shown.set(id, html);
  }

  function keep(columns) {
    for (const { id, order, html } of columns) {
      const known = latest.get(id)?.html || {};
      const whole = order.map((piece) => [piece, html[piece] ?? known[piece]]);
      latest.set(id, { order, html: Object.fromEntries(whole) });
    }
  }

  const SILENT_S = 1800; // a run that tells nothing for so long is most likely killed
  function ago() {
    if (!heard) return "";
    const s = Math.max(0, Math.round(Date.now() / 1000 - heard));
    if (s < 90) return `last event ${s} s ago`;
    const when = s < 5400 ? `${Math.round(s / 60)} min ago` : `${Math.round(s / 3600)} h ago`;
    return s < SILENT_S ? `last event ${when}` : `last event ${when}: it has probably been ended`;
  }

  function tell() {
    const at = Number(slider.value);
    const [number, whole] = [at, Number(slider.max)].map((n) => n.toLocaleString("en"));
    byId("at").textContent = `${number} of ${whole}`;
    const past = changes.filter(([update]) => update <= at);
    const said = past.length ? `Update ${past.at(-1)[0].toLocaleString("en")}: ${past.at(-1)[1]}` : "";
    byId("said").textContent = said;
    byId("said").title = said;
    slider.setAttribute("aria-valuetext", `update ${number} of ${whole}. ${said}`);
    const goesOn = data.live && states.includes("under way");
    const waits = data.live && states.every((state) => state === "not begun");
    bar.dataset.state = !follows ? "past" : away ? "away" : goesOn || waits ? "live" : "end";
    const word = { past: "Replay", away: "Offline", live: waits ? "Waiting" : "Live", end: "Ended" };
    if (byId("state").textContent !== word[bar.dataset.state]) {
      byId("state").textContent = word[bar.dataset.state];
    }
    byId("heard").textContent = away ? "connection lost, trying again"
      : waits ? "for its first event" : goesOn ? ago() : "";
    byId("now").textContent = goesOn ? "Live" : "End";
    byId("now").disabled = follows;
    byId("play").textContent = player ? "Pause" : "Play";
  }

  async function unpack() {
    const bytes = Uint8Array.from(atob(data.packed), (letter) => letter.charCodeAt(0));
    const plain = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    const { texts, moments } = JSON.parse(await new Response(plain).text());
    return moments.map(([update, order]) => ({
      update,
      columns: [{ id: data.columns[0].id, order: order.map(([id]) => id),
        html: Object.fromEntries(order.map(([id, text]) => [id, texts[text]])) }],
    }));
  }

  const asked = new Map(); // answers of the server, by update; the oldest goes first
  async function pastAt(update) {
    if (!data.live) {
      frames ??= await unpack();
      return (frames.findLast((frame) => frame.update <= update) || frames[0]).columns;
    }
    if (!asked.has(update)) {
      const answer = await fetch(`at?update=${update}`);
      if (!answer.ok) throw new Error(`the server answered ${answer.status}`);
      asked.set(update, (await answer.json()).columns);
      if (asked.size > 60) asked.delete(asked.keys().next().value);
    }
    return asked.get(update);
  }

  let busy = false;
  async function go() { // one request at a time; the last place that was asked for is shown
    follows = Number(slider.value) >= Number(slider.max);
    tell();
    if (busy) return;
    busy = true;
    try {
      for (let done = null; done !== slider.value; ) {
        done = slider.value;
        if (follows) showLatest();
        else show(await pastAt(Number(done)));
      }
    } catch (error) {
      byId("said").textContent = `That update cannot be shown: ${error.message}`;
    } finally {
      busy = false;
    }
  }

  function moveTo(update) {
    slider.value = update;
    return go();
  }
  function nextChange(direction) {
    const at = Number(slider.value);
    const places = changes.map(([update]) => update);
    return direction > 0 ? places.find((place) => place > at) ?? Number(slider.max)
      : places.findLast((place) => place < at) ?? 0;
  }
  function pause() {
    clearTimeout(player);
    player = 0;
    tell();
  }
  async function play() {
    const end = Number(slider.max);
    if (Number(slider.value) >= end) slider.value = 0;
    const step = Math.max(1, Math.round(end / 200));
    async function tick() {
      await moveTo(Math.min(end, Number(slider.value) + step));
      if (!player) return;
      if (Number(slider.value) >= end) pause();
      else player = setTimeout(tick, 60);
    }
    player = setTimeout(tick, 0);
    tell();
  }

  function take(message) {
    keep(message.columns);
    ({ changes, states, heard } = message);
    slider.max = message.updates;
    asked.clear();
    if (follows) {
      slider.value = message.updates;
      if (!busy) showLatest();
    }
    tell();
  }

  slider.addEventListener("input", () => { pause(); go(); });
  byId("back").addEventListener("click", () => { pause(); moveTo(nextChange(-1)); });
  byId("forth").addEventListener("click", () => { pause(); moveTo(nextChange(1)); });
  byId("play").addEventListener("click", () => (player ? pause() : play()));
  byId("now").addEventListener("click", () => { pause(); moveTo(slider.max); });
  bar.hidden = false;
  tell();
  if (data.live) {
    let known = data.id;
    let source = null;
    const listen = () => { // a browser has few connections to an address: a hidden tab holds none
      if (document.hidden || (source && source.readyState !== EventSource.CLOSED)) return;
      source = new EventSource(`events?after=${encodeURIComponent(known)}`);
      source.onmessage = (message) => {
        known = message.lastEventId;
        take(JSON.parse(message.data));
      };
      source.onopen = () => { away = false; tell(); };
      source.onerror = () => { // it tries again by itself, but not where the answer was an error
        away = true;
        tell();
        if (source.readyState === EventSource.CLOSED) setTimeout(listen, 3000);
      };
    };
    listen();
    document.addEventListener("visibilitychange", () => {
      if (document.hidden) source?.close();
      else listen();
    });
    setInterval(tell, 1000);
  }
})();
