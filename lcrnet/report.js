// The 3D views of report.html: people in metres (x right, y down, z away from the camera), drawn on a plain canvas.
"use strict";
(() => {
  const { bones, joints, scenes } = JSON.parse(document.getElementById("scenes").textContent);
  const TURN = 35, RISE = 8; // degrees: where the viewer stands at first, as in draw.view3d
  let scrolled = -Infinity;
  addEventListener("scroll", () => { scrolled = performance.now(); }, { passive: true });

  for (const canvas of document.querySelectorAll("canvas[data-scene]")) {
    const people = scenes[+canvas.dataset.scene], box = canvas.closest(".view");
    const choice = box.querySelector("select"), pointers = new Map();
    let turn = TURN, rise = RISE, zoom = 1, waiting = false;

    function draw() {
      waiting = false;
      const style = getComputedStyle(canvas), ink = style.getPropertyValue("--ink"), faint = style.getPropertyValue("--line");
      const colour = { r: style.getPropertyValue("--r"), l: style.getPropertyValue("--l"), m: style.getPropertyValue("--m") };
      const ratio = devicePixelRatio || 1, w = canvas.clientWidth, h = canvas.clientHeight;
      if (!w || !h) return;
      canvas.width = Math.round(w * ratio); canvas.height = Math.round(h * ratio);
      const g = canvas.getContext("2d");
      g.scale(ratio, ratio); g.lineCap = "round";

      const shown = choice && +choice.value >= 0 ? [people[+choice.value]] : people;
      const points = shown.flatMap((p) => [...(p.truth || []), ...(p.found || [])]);
      const range = (k) => [Math.min(...points.map((p) => p[k])), Math.max(...points.map((p) => p[k]))];
      const limits = [range(0), range(1), range(2)], middle = limits.map(([a, b]) => (a + b) / 2);
      const wide = Math.max(...points.map((p) => Math.hypot(p[0] - middle[0], p[2] - middle[2])));
      const high = (limits[1][1] - limits[1][0]) / 2;
      const metre = zoom * Math.min(w / 2 / (wide + 0.25), h / 2 / (Math.hypot(high, 0.35 * wide) + 0.25));

      const a = turn * Math.PI / 180, b = rise * Math.PI / 180;
      const ahead = [-Math.sin(a), 0, Math.cos(a)]; // the viewer's, level
      const see = ([x, y, z]) => { // pixels and distance from the viewer
        x -= middle[0]; y -= middle[1]; z -= middle[2];
        const forward = x * ahead[0] + z * ahead[2];
        return [w / 2 + metre * (x * Math.cos(a) + z * Math.sin(a)),
          h / 2 + metre * (y * Math.cos(b) - forward * Math.sin(b)), forward * Math.cos(b) + y * Math.sin(b)];
      };
      const line = (p, q, stroke, width, alpha = 1) => {
        g.globalAlpha = alpha; g.strokeStyle = stroke; g.lineWidth = width;
        g.beginPath(); g.moveTo(p[0], p[1]); g.lineTo(q[0], q[1]); g.stroke();
        g.globalAlpha = 1;
      };
      const write = (text, p, stroke = ink) => { g.fillStyle = stroke; g.fillText(text, p[0], p[1]); };

      // The floor: squares of half a metre; the edge towards the camera is a thick line
      const x0 = Math.floor(2 * limits[0][0] - 1) / 2, x1 = Math.ceil(2 * limits[0][1] + 1) / 2;
      const z0 = Math.floor(2 * limits[2][0] - 1) / 2, z1 = Math.ceil(2 * limits[2][1] + 1) / 2;
      for (let x = x0; x <= x1; x += 0.5) line(see([x, 0, z0]), see([x, 0, z1]), faint, 1);
      for (let z = z0; z <= z1; z += 0.5) line(see([x0, 0, z]), see([x1, 0, z]), faint, z === z0 ? 3 : 1);
      g.font = "11px system-ui, sans-serif"; g.textAlign = "center"; g.textBaseline = "top";
      const edge = see([(x0 + x1) / 2, 0, z0]);
      write("camera", [edge[0], edge[1] + 4]);

      // Far bones first. Truth is broad and pale, the estimate thin and strong
      const thin = Math.min(5, Math.max(1.5, metre / 45)), strokes = [];
      for (const person of shown) for (const [kind, width, alpha] of [["truth", 3 * thin, 0.4], ["found", thin, 1]]) {
        if (!person[kind]) continue;
        const pose = person[kind].map(see);
        for (const [p, q, side] of bones) strokes.push([(pose[p][2] + pose[q][2]) / 2, pose[p], pose[q], colour[side], width, alpha]);
        if (kind === "found") pose.forEach((p, j) => strokes.push([p[2] - 0.01, p, p, colour[joints[j]], 2.6 * thin, 1]));
      }
      strokes.sort((s, t) => t[0] - s[0]);
      for (const [, ...stroke] of strokes) line(...stroke);
      g.textBaseline = "bottom";
      if (shown.length > 1) for (const person of shown) {
        const pose = (person.truth || person.found).map(see);
        const whole = person.label.split(":")[0], brief = whole.replace("truth", "t").replace("found", "f").replace(/ (?=\d)| \+/g, "");
        write(w / shown.length > 90 ? whole : brief, [pose.reduce((s, p) => s + p[0], 0) / pose.length, Math.min(...pose.map((p) => p[1])) - 6]);
      }
    }
    const redraw = () => { if (!waiting) { waiting = true; requestAnimationFrame(draw); } };
    const reset = () => { turn = TURN; rise = RISE; zoom = 1; redraw(); };
    const turned = (x, y) => { turn -= x; rise = Math.min(90, Math.max(-90, rise + y)); redraw(); };
    const zoomed = (factor) => { zoom = Math.min(20, Math.max(0.3, zoom * factor)); redraw(); };
    const spread = () => { const [p, q] = [...pointers.values()]; return Math.hypot(p.x - q.x, p.y - q.y); };

    canvas.addEventListener("pointerdown", (e) => {
      canvas.setPointerCapture(e.pointerId);
      pointers.set(e.pointerId, { x: e.clientX, y: e.clientY });
    });
    canvas.addEventListener("pointermove", (e) => {
      const last = pointers.get(e.pointerId);
      if (!last) return;
      const before = pointers.size === 2 ? spread() : 0;
      pointers.set(e.pointerId, { x: e.clientX, y: e.clientY });
      if (pointers.size === 2) zoomed(spread() / Math.max(before, 1));
      else turned(0.5 * (e.clientX - last.x), 0.5 * (e.clientY - last.y));
    });
    for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, (e) => pointers.delete(e.pointerId));
    canvas.addEventListener("wheel", (e) => {
      if (performance.now() - scrolled < 300) return; // the reader is scrolling the page and has come across a view
      e.preventDefault();
      zoomed(Math.exp(-0.0015 * e.deltaY * (e.deltaMode ? 30 : 1)));
    }, { passive: false });
    canvas.addEventListener("dblclick", reset);
    const keys = {
      ArrowLeft: () => turned(-10, 0), ArrowRight: () => turned(10, 0), ArrowUp: () => turned(0, -10),
      ArrowDown: () => turned(0, 10), "+": () => zoomed(1.2), "-": () => zoomed(1 / 1.2), 0: reset,
    };
    canvas.addEventListener("keydown", (e) => {
      if (!keys[e.key] || e.ctrlKey || e.metaKey || e.altKey) return;
      e.preventDefault();
      keys[e.key]();
    });
    for (const button of box.querySelectorAll("button[data-turn]")) button.addEventListener("click", () => {
      turn = +button.dataset.turn; rise = +button.dataset.rise; zoom = 1; redraw();
    });
    if (choice) choice.addEventListener("change", redraw);
    for (const query of ["(prefers-color-scheme: dark)", "print"]) matchMedia(query).addEventListener("change", draw);
    new ResizeObserver(redraw).observe(canvas);
  }
})();
