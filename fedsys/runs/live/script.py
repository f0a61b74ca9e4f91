"""The script of the live page: asks for ``run.json`` once a second and draws what it says.

Texts are set as texts, never as HTML: names in a run may hold anything. What both pages need, that
of a run and that of an endpoint (`fedsys.runs.live.served_script`), stands in `COMMON`, which calls
``show`` and ``map`` of the page.
"""

from __future__ import annotations

from typing import Final

COMMON: Final = r"""'use strict';
const EVERY_MS = 1000;
const COLORS = 7;
const SVG = 'http://www.w3.org/2000/svg';
const at = (id) => document.getElementById(id);
let run = null, chosen = null, failures = 0;

function el(name, attributes, ...children) {
  const made = document.createElement(name);
  return dress(made, attributes, children);
}
function svg(name, attributes, ...children) {
  const made = document.createElementNS(SVG, name);
  return dress(made, attributes, children);
}
function dress(made, attributes, children) {
  for (const [key, value] of Object.entries(attributes || {})) made.setAttribute(key, value);
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}
const known = (value) => value !== null && value !== undefined;
const percent = (value) => known(value) ? (100 * value).toFixed(2) + ' %' : '–';
const share = (value) => known(value) ? number(100 * value, 3) + ' %' : '–';
const number = (value, digits = 4) => known(value) ? String(+value.toPrecision(digits)) : '–';
function seconds(value) {
  if (!known(value)) return '–';
  if (value > 0 && value < .001) return '< 1 ms';
  if (value > 0 && value < 1) return number(1000 * value, 3) + ' ms';
  if (value < 60) return number(value, 3) + ' s';
  const whole = Math.round(value), minutes = Math.floor(whole / 60);
  return minutes < 60 ? `${minutes} min ${whole % 60} s`
    : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

// Figures above the page, each [name, text, id]; long words in smaller letters.
function fillCards(told) {
  at('cards').replaceChildren(...told.map(([name, text, id]) =>
    el('div', {class: 'card', 'data-figure': id},
      el('b', String(text).length > 9 ? {class: 'long'} : {}, String(text)),
      el('span', {}, name))));
}

async function ask() {
  try {
    const answer = await fetch('run.json', {cache: 'no-store'});
    if (!answer.ok) throw new Error(answer.status);
    run = await answer.json();
    failures = 0;
    show();
    if (run.status !== 'running') return; // nothing changes any more
  } catch (error) {
    failures += 1;
    if (failures === 3) {
      at('status').textContent = 'out of reach: what it shows has ended, or the page has';
      at('status').className = 'badge gone';
    }
    if (failures > 60) return;
  }
  setTimeout(ask, EVERY_MS);
}

// Three to six round numbers that hold all values of an axis.
function ticks(low, high) {
  const rough = (high - low) / 4, ten = 10 ** Math.floor(Math.log10(rough));
  const step = ten * [1, 2, 2.5, 5, 10].find((part) => part * ten >= rough * (1 - 1e-9));
  const first = Math.floor(low / step + 1e-9), last = Math.ceil(high / step - 1e-9);
  return Array.from({length: last - first + 1}, (_, i) => +((first + i) * step).toPrecision(12));
}

function figure(title, series, form, place = (v) => `round ${v}`) {
  const width = 420, height = 190, bottom = 24, right = 12, top = 8;
  const all = series.flatMap(([, points]) => points);
  const xs = all.map(([x]) => x), ys = all.map(([, y]) => y);
  const x0 = Math.min(...xs), x1 = Math.max(...xs, x0 + 1);
  const lowest = Math.min(...ys, 0), highest = Math.max(...ys);
  const scale = ticks(lowest, highest > lowest ? highest : lowest + 1);
  const y0 = scale[0], y1 = scale[scale.length - 1];
  const label = (v) => form(v).replace('.00 %', ' %').replace('min 0 s', 'min');
  const letter = 8.2; // at the width of a phone, where letters are largest beside the chart
  const left = 10 + letter * Math.max(4, ...scale.map((v) => label(v).length));
  const x = (v) => left + (v - x0) / (x1 - x0) * (width - left - right);
  const y = (v) => top + (y1 - v) / (y1 - y0) * (height - top - bottom);
  const marks = scale.flatMap((v) => [
    svg('line', {class: 'grid', x1: left, x2: width - right, y1: y(v), y2: y(v)}),
    svg('text', {x: left - 6, y: y(v) + 4, 'text-anchor': 'end'}, label(v))]);
  const ends = [[x0, 'start'], [x1, 'end']].map(([v, anchor]) =>
    svg('text', {x: x(v), y: height - 6, 'text-anchor': anchor}, place(v)));
  const lines = series.map(([, points], i) => points.length === 1
    ? svg('circle', {class: `dot k${i}`, cx: x(points[0][0]), cy: y(points[0][1]), r: 3.5})
    : svg('polyline', {class: `line k${i}`, points: points.map(([a, b]) =>
      `${x(a).toFixed(1)},${y(b).toFixed(1)}`).join(' ')}));
  const last = series.map(([name, points]) => `${name} ${form(points[points.length - 1][1])}`);
  const drawing = svg('svg', {class: 'chart', viewBox: `0 0 ${width} ${height}`, role: 'img',
    'aria-label': `${title}: ${last.join(', ')}`}, ...marks, ...ends, ...lines);
  const legend = el('ul', {class: 'legend'}, ...last.map((text, i) => el('li', {},
    svg('svg', {class: 'key', viewBox: '0 0 18 8'},
      svg('line', {class: `line k${i}`, x1: 0, x2: 18, y1: 4, y2: 4})), text)));
  return el('figure', {class: 'panel'}, el('figcaption', {}, title), drawing, legend);
}

function happened() {
  if (!run.happened.length) return;
  const items = run.happened.slice().reverse().map((event) => el('li', {'data-kind': event.kind},
    el('b', {}, event.kind), known(event.round) ? `round ${event.round}: ` : '', event.text,
    known(event.after_s)
      ? el('span', {class: 'muted'}, ` after ${seconds(event.after_s)}`) : null));
  at('happened').replaceChildren(...items);
}

let resizing = 0;
addEventListener('resize', () => {
  clearTimeout(resizing);
  resizing = setTimeout(() => { if (run) map(); }, 150);
});
"""

SCRIPT: Final = (
    COMMON
    + r"""
let edgesBefore = new Map(), movedUntil = new Map();
// What the run is judged by: its name in files, a title, and how it is written.
const judged = () => [run.metric.name, run.metric.title, run.metric.percent ? percent : number];
function show() {
  document.title = `${run.name} · fedsys`;
  at('name').textContent = run.name;
  at('status').textContent = run.status;
  at('status').className = `badge ${run.status}`;
  at('error').textContent = run.error;
  at('error').hidden = !run.error;
  at('chosen').textContent = Object.entries(run.chosen).map(([k, v]) => `${k} ${v}`).join(', ');
  const done = run.last.round || 0;
  at('progress').max = run.rounds || Math.max(done, 1);
  at('progress').value = done;
  cards(done);
  noteMoves();
  map();
  charts();
  happened();
  table();
  at('when').textContent = `Read at ${new Date().toLocaleTimeString()}.`;
}

function cards(done) {
  const last = run.last, result = run.result, [metric, title, form] = judged();
  const told = [
    ['rounds', `${done} of ${run.rounds || '?'}`, 'rounds'],
    [`validation ${title}`, form(last[`val_${metric}`]), 'accuracy'],
    ['validation loss', number(last.val_loss), 'loss'],
    ['last round', seconds(last.seconds_round), 'seconds'],
    ['so far', seconds(last.seconds_elapsed), 'elapsed'],
  ];
  if (known(result[metric])) told.push([`test ${title}`, form(result[metric]), 'test']);
  if (known(last.virtual_s)) told.push(['round on the fleet', seconds(last.virtual_s), 'virtual']);
  if (known(last.regret)) told.push(['regret', percent(last.regret), 'regret']);
  if (known(last.epsilon)) {
    const budget = known(run.budget) ? ` of ${number(run.budget)}` : '';
    told.push(['ε spent', number(last.epsilon) + budget, 'epsilon']);
  }
  if (known(last.sparsity)) told.push(['weights pruned', percent(last.sparsity), 'sparsity']);
  fillCards(told);
}

// A device that changed its edge server is marked for some seconds.
function noteMoves() {
  const now = Date.now();
  for (const device of run.devices) {
    const before = edgesBefore.get(device.client);
    if (before && device.edge && before !== device.edge) movedUntil.set(device.client, now + 5000);
    edgesBefore.set(device.client, device.edge);
  }
}

function map() {
  const width = Math.max(280, at('map').clientWidth || 800), cell = 76;
  const rows = Math.ceil(run.devices.length / Math.max(1, Math.floor((width - 10) / cell)));
  const columns = Math.max(1, Math.ceil(run.devices.length / rows));
  const edges = run.edges.length ? run.edges : [{name: 'server', lost: false}];
  const perRow = Math.max(1, Math.floor(width / 104));
  const floors = Math.ceil(edges.length / perRow);
  const top = 54 * floors + 46;
  const height = top + rows * 84 + 6;
  const places = new Map(edges.map((edge, i) => {
    const floor = Math.floor(i / perRow), inFloor = Math.min(perRow, edges.length - floor * perRow);
    return [edge.name, {x: width * (i % perRow + .5) / inFloor, y: 26 + 54 * floor}];
  }));
  const wires = [], nodes = [];
  run.devices.forEach((device, i) => {
    const row = Math.floor(i / columns);
    const inRow = Math.min(columns, run.devices.length - row * columns);
    const x = width * (i % columns + .5) / inRow, y = top + row * 84 + 22;
    const home = places.get(device.edge) || (run.edges.length ? null : places.get('server'));
    if (home) wires.push(wire(device, x, y, home));
    nodes.push(node(device, x, y));
  });
  const servers = edges.map((edge) => {
    const place = places.get(edge.name);
    return svg('g', {class: edge.lost ? 'edge lost' : 'edge', 'data-edge': edge.name},
      svg('rect', {x: place.x - 46, y: place.y - 15, width: 92, height: 30, rx: 6}),
      svg('text', {x: place.x, y: place.y + 4}, edge.name + (edge.lost ? ' lost' : '')));
  });
  const focused = document.activeElement && document.activeElement.dataset
    ? document.activeElement.dataset.device : undefined;
  const drawing = svg('svg', {viewBox: `0 0 ${width} ${height}`, role: 'group',
    'aria-label': `${run.devices.length} devices and ${run.edges.length} edge servers`},
    ...wires, ...servers, ...nodes);
  at('map').replaceChildren(drawing);
  if (focused !== undefined) {
    const again = drawing.querySelector(`[data-device="${focused}"]`);
    if (again) again.focus({preventScroll: true});
  }
  explain();
}

function wire(device, x, y, home) {
  const moved = (movedUntil.get(device.client) || 0) > Date.now();
  const kind = device.lost ? 'wire lost' : moved ? 'wire moved' : 'wire';
  const middle = (home.y + 15 + y - 18) / 2;
  return svg('path', {class: kind, 'stroke-width': 2,
    d: `M${x} ${y - 18}C${x} ${middle} ${home.x} ${middle} ${home.x} ${home.y + 15}`});
}

function node(device, x, y) {
  const radius = 16, around = 2 * Math.PI * radius;
  const share = known(device.share) ? device.share : device.undecided ? 0 : 1;
  const group = svg('g', {class: 'device' + (device.lost ? ' lost' : '')
      + (chosen === device.client ? ' chosen' : ''), tabindex: 0, role: 'button',
    'data-device': device.client, 'aria-label': words(device)},
    svg('circle', {class: 'body', cx: x, cy: y, r: radius}),
    svg('circle', {class: 'share', cx: x, cy: y, r: radius, transform: `rotate(-90 ${x} ${y})`,
      'stroke-dasharray': `${share * around} ${around}`}),
    svg('text', {x, y: y + 4}, String(device.client)),
    svg('text', {x, y: y + 34, class: 'cut'}, place(device)),
    svg('text', {x, y: y + 48, class: 'cut'}, known(device.up_mbit_s) && !device.whole
      ? `${number(device.up_mbit_s, 2)} Mbit/s` : ''));
  const choose = () => { chosen = device.client; explain(); mark(); };
  group.addEventListener('click', choose);
  group.addEventListener('focus', choose);
  return group;
}

function mark() {
  for (const each of document.querySelectorAll('.device')) {
    each.classList.toggle('chosen', each.dataset.device === String(chosen));
  }
}

function place(device) {
  if (device.lost) return 'lost';
  if (!known(device.cut)) return '';
  return device.whole ? 'whole' : device.unit ? `to ${device.unit}` : 'nothing';
}

function words(device) {
  const told = [`device ${device.client}`];
  if (device.machine) told[0] += ` (${device.machine})`;
  if (device.lost) told.push('lost in the last round');
  if (!known(device.cut)) {
    told.push(device.undecided ? 'nothing is decided for it so far' : 'trains the whole model');
  }
  else if (device.whole) told.push('trains the whole model alone');
  else {
    const unit = device.unit ? `up to ${device.unit}` : 'nothing';
    told.push(`trains ${unit} (${percent(device.share)} of the work), the rest at ${device.edge}`);
    told.push(`${device.pieces} piece${device.pieces === 1 ? '' : 's'}, ${device.codec}`);
  }
  if (known(device.up_mbit_s)) {
    const down = number(device.down_mbit_s, 3);
    told.push(`link ${number(device.up_mbit_s, 3)} up, ${down} down Mbit/s`);
  }
  if (known(device.predicted_s)) told.push(`predicted ${seconds(device.predicted_s)}`);
  if (known(device.measured_s)) told.push(`measured ${seconds(device.measured_s)}`);
  if (device.reason) told.push(device.reason);
  return told.join('; ');
}

function explain() {
  const device = run.devices.find((each) => each.client === chosen);
  if (!device) return;
  const text = words(device);
  if (at('chosen-device').textContent !== text) at('chosen-device').textContent = text;
}

function charts() {
  const rows = run.rows, names = rows.length ? Object.keys(rows[rows.length - 1]) : [];
  const [metric, named, text] = judged(), title = named[0].toUpperCase() + named.slice(1);
  const columns = (head) => names.filter((n) => n.startsWith(head) && n !== 'seconds_elapsed')
    .map((n) => [n.slice(head.length), n]);
  const drawn = [
    [title, [['validation', `val_${metric}`], ['training', `train_${metric}`]], text],
    ['Loss', [['validation', 'val_loss'], ['training', 'train_loss']], (v) => number(v, 3)],
    ['Seconds of a round', columns('seconds_'), seconds],
    ['Round on the modelled fleet', [['seconds', 'virtual_s']], seconds],
    ['Idle shares', columns('idle_'), share],
    ['ε spent', [['ε', 'epsilon']], (v) => number(v, 3)],
    ['Pruned', [['weights', 'sparsity'], ['channels', 'dead_channels']], share],
  ];
  const made = [];
  for (const [title, wanted, form] of drawn) {
    const series = wanted.map(([name, key]) => [name, rows.filter((r) => known(r[key]))
      .map((r) => [r.round, r[key]])]).filter(([, points]) => points.length);
    if (series.length) made.push(figure(title, series.slice(0, COLORS), form));
  }
  if (!made.length) made.push(el('p', {class: 'muted'}, 'They begin when a round has ended.'));
  at('charts').replaceChildren(...made);
}

function table() {
  const rows = run.devices.filter((device) => known(device.cut));
  if (!rows.length) {
    at('devices').replaceChildren(el('tbody', {}, el('tr', {}, el('td', {class: 'muted'},
      run.devices.some((d) => d.undecided) ? 'Nothing is decided so far.'
        : 'Every device trains the whole model.'))));
    return;
  }
  const names = ['device', 'machine', 'cut after', 'on the device', 'edge', 'pieces', 'codec',
    'up, Mbit/s', 'predicted', 'measured', 'why'];
  const cells = (d) => [d.client, d.machine, d.whole ? 'whole' : d.unit || 'nothing',
    percent(d.share), d.edge, d.pieces, d.codec, number(d.up_mbit_s, 3), seconds(d.predicted_s),
    seconds(d.measured_s), d.reason];
  at('devices').replaceChildren(
    el('thead', {}, el('tr', {}, ...names.map((n) => el('th', {scope: 'col'}, n)))),
    el('tbody', {}, ...rows.map((d) => el('tr', {}, ...cells(d).map((text, i, all) =>
      el('td', i === all.length - 1 ? {class: 'why'} : {}, String(text ?? '')))))));
}
ask();
"""
)
