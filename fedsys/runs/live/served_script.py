"""The script of an endpoint's live page: hosts, portfolio, what answers, and why."""

from __future__ import annotations

from typing import Final

from fedsys.runs.live.script import COMMON

SERVED_SCRIPT: Final = (
    COMMON
    + r"""
const ms = (value) => !known(value) ? '–'
  : Math.abs(value) < 999.5 ? number(value, 3) + ' ms' : number(value / 1000, 3) + ' s';

function show() {
  document.title = `${run.name} · fedsys serve`;
  at('name').textContent = run.name;
  at('status').textContent = run.status === 'running' ? (run.ready ? 'answers' : 'waits')
    : 'out of reach';
  at('status').className = `badge ${run.status === 'running' ? (run.ready ? 'finished' : 'running')
    : 'gone'}`;
  at('chosen').textContent = Object.entries(run.chosen).map(([k, v]) => `${k} ${v}`).join(', ');
  at('error').textContent = run.error;
  at('error').hidden = !run.error;
  cards();
  at('hosts').hidden = !run.hosts.length;
  if (run.hosts.length) map();
  why();
  at('portfolio').hidden = !run.front.length;
  if (run.front.length) front();
  charts();
  happened();
  table();
  at('when').textContent = `Read at ${new Date().toLocaleTimeString()}.`;
}

function cards() {
  fillCards(run.cards.map(([id, name, value]) => [name, value, id]));
}

function map() {
  const width = Math.max(280, at('map').clientWidth || 800), narrow = width < 560;
  const count = run.hosts.length, room = width - 12, boxHeight = 58;
  const boxWidth = narrow ? room : Math.min(200, room / count * .7);
  const gap = narrow ? 44 : (room - count * boxWidth) / Math.max(1, count - 1);
  const height = narrow ? count * boxHeight + (count - 1) * gap + 12 : boxHeight + 40;
  const place = (i) => narrow ? [6, 6 + i * (boxHeight + gap)]
    : [6 + (count > 1 ? i * (boxWidth + gap) : (width - boxWidth) / 2), 14];
  const wires = run.links.map((link, i) => {
    const [x0, y0] = place(i), [x1, y1] = place(i + 1);
    const from = narrow ? [x0 + 40, y0 + boxHeight] : [x0 + boxWidth, y0 + boxHeight / 2];
    const to = narrow ? [x1 + 40, y1] : [x1, y1 + boxHeight / 2];
    const text = known(link.mbit_s) ? `${number(link.mbit_s, 3)} Mbit/s` : ms(link.ms);
    return svg('g', {'data-link': link.from},
      svg('path', {class: link.lost ? 'wire lost' : 'wire', 'stroke-width': 2,
        d: `M${from[0]} ${from[1]}L${to[0]} ${to[1]}`}),
      svg('text', narrow ? {x: from[0] + 70, y: (from[1] + to[1]) / 2 + 4}
        : {x: (from[0] + to[0]) / 2, y: from[1] + (gap < 90 ? 46 : -8)}, text));
  });
  const boxes = run.hosts.map((host, i) => box(host, ...place(i), boxWidth, boxHeight));
  const focused = document.activeElement && document.activeElement.dataset
    ? document.activeElement.dataset.host : undefined;
  const drawing = svg('svg', {viewBox: `0 0 ${width} ${height}`, role: 'group',
    'aria-label': `${count} hosts`}, ...wires, ...boxes);
  at('map').replaceChildren(drawing);
  again(drawing, 'host', focused);
  explain();
}

function again(drawing, key, value) {
  if (value === undefined) return;
  const places = [...drawing.querySelectorAll(`[data-${key}]`)];
  const found = places.find((each) => each.dataset[key] === value);
  if (found) found.focus({preventScroll: true});
}

function box(host, x, y, width, height) {
  const kind = ['host', host.state, host.units ? '' : 'idle', chosen === host.name ? 'chosen' : ''];
  const group = svg('g', {class: kind.join(' '), tabindex: 0, role: 'button',
    'data-host': host.name, 'aria-label': words(host)},
    svg('rect', {x, y, width, height, rx: 8}),
    svg('text', {x: x + width / 2, y: y + 19},
      host.name + (host.state === 'alive' ? '' : ` (${host.state})`)),
    svg('text', {x: x + width / 2, y: y + 35, class: 'cut'}, host.where),
    svg('text', {x: x + width / 2, y: y + 50, class: 'cut'},
      known(host.compute_ms) ? `computes ${ms(host.compute_ms)}` : ''));
  const choose = () => { chosen = host.name; explain(); mark(); };
  group.addEventListener('click', choose);
  group.addEventListener('focus', choose);
  return group;
}

function mark() {
  for (const each of document.querySelectorAll('.host')) {
    each.classList.toggle('chosen', each.dataset.host === chosen);
  }
}

function words(host) {
  const told = [`${host.name} at ${host.address}` + (host.pid ? ` (process ${host.pid})` : '')];
  told.push(host.state, `computes ${host.where}`);
  if (known(host.compute_ms)) told.push(`${ms(host.compute_ms)} for the last request`);
  if (known(host.queue_ms)) told.push(`which waited ${ms(host.queue_ms)} there`);
  if (known(host.round_trip_ms)) told.push(`answers heartbeats within ${ms(host.round_trip_ms)}`);
  if (host.why) told.push(host.why);
  return told.join('; ');
}

function explain() {
  const host = run.hosts.find((each) => each.name === chosen);
  if (!host) return;
  if (at('chosen-host').textContent !== words(host)) at('chosen-host').textContent = words(host);
}

function why() {
  at('why').replaceChildren(...run.why.map(([what, text]) =>
    el('p', {}, el('b', {}, `${what}: `), text)));
  if (!run.why.length) at('why').append(el('p', {class: 'muted'}, 'It is as it was begun.'));
}

// Accuracy over latency: what answers now is marked, and what is in memory has a ring.
function front() {
  const width = 420, height = 200, left = 62, bottom = 34, right = 16, top = 10;
  const xs = run.front.map((v) => v.p50_ms), ys = run.front.map((v) => v.accuracy);
  const span = (values) => {
    const low = Math.min(...values), high = Math.max(...values);
    const pad = .08 * (high - low) || Math.abs(high) * .1 || 1;
    return [low - pad, high + pad];
  };
  const [x0, x1] = span(xs), [y0, y1] = span(ys);
  const x = (v) => left + (v - x0) / (x1 - x0) * (width - left - right);
  const y = (v) => top + (y1 - v) / (y1 - y0) * (height - top - bottom);
  const marks = [0, .5, 1].map((part) => y0 + part * (y1 - y0)).flatMap((v) => [
    svg('line', {class: 'grid', x1: left, x2: width - right, y1: y(v), y2: y(v)}),
    svg('text', {x: left - 6, y: y(v) + 4, 'text-anchor': 'end'}, percent(v))]);
  const ends = [[x0, 'start'], [x1, 'end']].map(([v, anchor]) =>
    svg('text', {x: x(v), y: height - 18, 'text-anchor': anchor}, ms(v)));
  const focused = document.activeElement && document.activeElement.dataset
    ? document.activeElement.dataset.variant : undefined;
  const told = (v) => `${v.name}: ${percent(v.accuracy)} in ${ms(v.p50_ms)}`
    + (v.now ? ', answers now' : v.ready ? ', in memory' : '');
  const points = run.front.map((v) => svg('g', {class: `variant ${v.now ? 'now' : ''}`, tabindex: 0,
    role: 'img', 'data-variant': v.name, 'aria-label': told(v)},
    svg('title', {}, told(v)),
    svg('circle', {cx: x(v.p50_ms), cy: y(v.accuracy), r: v.now ? 7 : 5})));
  const drawing = svg('svg', {class: 'chart', viewBox: `0 0 ${width} ${height}`, role: 'group',
    'aria-label': 'portfolio: accuracy over latency'}, ...marks, ...ends, ...points,
    svg('text', {x: (left + width - right) / 2, y: height - 4, 'text-anchor': 'middle'},
      'median latency'));
  const list = el('ul', {class: 'legend'}, ...run.front.map((v) => el('li', {}, told(v))));
  at('front').replaceChildren(
    el('figure', {class: 'panel'}, el('figcaption', {}, 'Accuracy over latency'), drawing, list));
  again(drawing, 'variant', focused);
}

function charts() {
  const series = (key) => run.rows.filter((r) => known(r[key])).map((r) => [r.at_s, r[key]]);
  const drawn = [
    ['Latency: 95 of 100 requests within', [['seen', series('p95_ms')],
      ['expected', series('expected_ms')]], ms],
    ['Images per second', [['answered', series('rate')]], (v) => number(v, 3)],
  ];
  const made = [];
  for (const [title, wanted, form] of drawn) {
    const there = wanted.filter(([, points]) => points.length);
    if (there.length) made.push(figure(title, there, form, (v) => `${seconds(v)}`));
  }
  at('charts').replaceChildren(...made);
}

function table() {
  const names = ['after', 'decision', 'predicted', 'measured', 'why'];
  const cells = (d) => [seconds(d.after_s), d.text, ms(d.predicted_ms), ms(d.measured_ms), d.why];
  const rows = run.decided.length ? run.decided.slice().reverse().map((d) => el('tr', {},
    ...cells(d).map((text, i, all) =>
      el('td', i === all.length - 1 ? {class: 'why'} : {}, String(text ?? '')))))
    : [el('tr', {}, el('td', {class: 'muted'}, 'Nothing had to be decided so far.'))];
  at('decided').replaceChildren(
    el('thead', {}, el('tr', {}, ...names.map((n) => el('th', {scope: 'col'}, n)))),
    el('tbody', {}, ...rows));
}
ask();
"""
)
