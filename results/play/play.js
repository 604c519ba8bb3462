/* Tokenizer and transformer in a browser: what tokenizer.py, ar_model.py and sample.py do, in plain loops.
In reading order: 1. layers; 2. tokenizer (eq. 1, 2); 3. transformer (eq. 5 to 7); 4. the page.

A map is {h, w, c, v}: v holds h x w places of c channels, the numbers of a place side by side: (h, w, C) is
what torch has as (C, h, w). Rows of a batch are places, too: (1, R, D). `net`: a model's config, and weights
by their names in torch. All is float64, as is JavaScript: float32 would be converted at each use. */
"use strict";

// ---- 1. Layers --------------------------------------------------------------------------------------------

const newMap = (h, w, c) => ({h, w, c, v: new Float64Array(h * w * c)});
const each = (x, change) => ({...x, v: x.v.map(change)});              // change(number, its index)
const add = (x, y) => each(x, (value, i) => value + y.v[i]);
const silu = x => each(x, value => value / (1 + Math.exp(-value)));
const div = (a, b) => Math.floor(a / b);
const sum = (a, b) => a + b;                                           // of an array: reduce(sum)

/** A model of the page's data: its config, and weights {shape, v} from half floats. */
function unpack({config, rope, layout, halves}) {
    const numbers = Float64Array.from(new Float16Array(Uint8Array.fromBase64(halves).buffer));
    const net = {config, rope};
    let end = 0;
    for (const [name, shape] of layout)
        net[name] = {shape, v: numbers.subarray(end, end += shape.reduce((product, size) => product * size))};
    return net;
}

/** k x k places, from `before` each `stride`-th one on, as its channels: (h / stride, .., k k C), 0 outside.
    With k = stride this is space-to-depth: channel c at (dy, dx) becomes channel (dy k + dx) C + c. */
function windows(x, k, stride, before) {
    const y = newMap(Math.ceil(x.h / stride), Math.ceil(x.w / stride), k * k * x.c);
    for (let i = 0; i < y.v.length; i += x.c) {
        const place = div(i, y.c);
        const n = i % y.c / x.c;
        const row = div(place, y.w) * stride + div(n, k) - before;
        const column = place % y.w * stride + n % k - before;
        const from = (row * x.w + column) * x.c;
        if (row >= 0 && row < x.h && column >= 0 && column < x.w)
            y.v.set(x.v.subarray(from, from + x.c), i);
    }
    return y;
}

/** The inverse of space-to-depth: (h, w, p p C) to (h p, w p, C). */
function depthToSpace(x, p) {
    const y = newMap(x.h * p, x.w * p, x.c / p ** 2);
    return each(y, (_, i) => {
        const row = div(i, y.c * y.w);
        const column = div(i, y.c) % y.w;
        const c = (row % p * p + column % p) * y.c + i % y.c;
        return x.v[(div(row, p) * x.w + div(column, p)) * x.c + c];
    });
}

/** nn.Conv2d of a weight (O, k, k, C), for k = 1 also nn.Linear: (h, w, C) to (h / stride, w / stride, O). */
function conv(net, name, x, stride = 1) {
    const {shape: [O, k], v: weight} = net[`${name}.weight`];
    const bias = net[`${name}.bias`]?.v ?? new Float64Array(O);
    const {h, w, c: C, v} = k === 1 ? x : windows(x, k, stride, k >> 1);
    const y = newMap(h, w, O);
    for (let i = 0; i < y.v.length; i++) {
        const place = i % (h * w);                         // a kernel at all places, as it stays in the cache
        const o = div(i, h * w);
        const kernel = weight.subarray(o * C, o * C + C);
        let total = bias[o];
        for (let c = 0; c < C; c++)                        // here all time is spent
            total += kernel[c] * v[place * C + c];
        y.v[place * O + o] = total;
    }
    return y;
}

/** GroupNorm: each of 32 groups of channels to mean 0 and variance 1, then times `gamma` plus `beta` (C). */
function groupNorm(x, gamma, beta) {
    const groupOf = i => div(i % x.c * 32, x.c);
    const mean = new Float64Array(32);
    const variance = new Float64Array(32);
    x.v.forEach((value, i) => mean[groupOf(i)] += value * 32 / x.v.length);
    x.v.forEach((value, i) => variance[groupOf(i)] += (value - mean[groupOf(i)]) ** 2 * 32 / x.v.length);
    const normed = each(x, (value, i) => (value - mean[groupOf(i)]) / Math.sqrt(variance[groupOf(i)] + 1e-6));
    return each(normed, (value, i) => value * gamma[i % x.c] + beta[i % x.c]);
}

const activate = (net, name, x) => silu(groupNorm(x, net[`${name}.weight`].v, net[`${name}.bias`].v));

/** AdaptiveGroupNorm: gamma and beta come from std and mean of each bit over ALL tokens q (h, w, K). */
function adaptiveNorm(net, name, x, q) {
    const mean = newMap(1, 1, q.c);
    const variance = newMap(1, 1, q.c);
    q.v.forEach((value, i) => mean.v[i % q.c] += value / (q.h * q.w));
    q.v.forEach((value, i) => variance.v[i % q.c] += (value - mean.v[i % q.c]) ** 2 / (q.h * q.w - 1));
    const std = each(variance, value => Math.sqrt(value + 1e-6));
    return groupNorm(x, conv(net, `${name}.gamma`, std).v, conv(net, `${name}.beta`, mean).v);
}

// ---- 2. Tokenizer -----------------------------------------------------------------------------------------

/** `count` residual blocks: GN - SiLU - conv - GN - SiLU - conv, plus the input. */
function resBlocks(net, name, count, x) {
    for (let i = 0; i < count; i++) {
        const shortcut = `${name}.${i}.nin_shortcut`;      // where the width changes
        let y = conv(net, `${name}.${i}.conv1`, activate(net, `${name}.${i}.norm1`, x));
        y = conv(net, `${name}.${i}.conv2`, activate(net, `${name}.${i}.norm2`, y));
        x = add(y, `${shortcut}.weight` in net ? conv(net, shortcut, x) : x);
    }
    return x;
}

/** Encoder: a picture (H, W, 3) in [-1, 1] to z (h, w, K), not yet quantised. */
function encode(net, picture) {
    const {patch, blocks, mid_blocks, channel_multipliers: {length: levels}} = net.config;
    let x = conv(net, "encoder.conv_in", windows(picture, patch, patch, 0));
    for (let i = 0; i < levels; i++) {
        x = resBlocks(net, `encoder.down.${i}.block`, blocks, x);
        if (i < levels - 1)
            x = conv(net, `encoder.down.${i}.downsample`, x, 2);           // (H / 2^i, W / 2^i, width)
    }
    x = resBlocks(net, "encoder.mid_block", mid_blocks, x);
    return conv(net, "encoder.conv_out", activate(net, "encoder.norm_out", x));
}

/** Eq. 1 and 2: an id a place, the sum of 2^k over the channels k of z (h, w, K) that are positive. */
function quantise(z) {
    const ids = new Array(z.h * z.w).fill(0);
    z.v.forEach((value, i) => ids[div(i, z.c)] += value > 0 ? 2 ** (i % z.c) : 0);
    return ids;
}

/** Decoder: h x w ids to a picture (H, W, 3) in about [-1, 1]. */
function decode(net, ids, h, w) {
    const {bits: K, patch, blocks, mid_blocks, channel_multipliers: {length: levels}} = net.config;
    const q = each(newMap(h, w, K), (_, i) => ids[div(i, K)] >> i % K & 1 ? 1 : -1);
    let x = resBlocks(net, "decoder.mid_block", mid_blocks, conv(net, "decoder.conv_in", q));
    for (let i = levels - 1; i >= 0; i--) {                // deepest first
        if (net.config.adaptive_norm)
            x = adaptiveNorm(net, `decoder.adaptive.${i}`, x, q);
        x = resBlocks(net, `decoder.up.${i}.block`, blocks, x);
        if (i > 0)
            x = depthToSpace(conv(net, `decoder.up.${i}.upsample.conv1`, x), 2);
    }
    return depthToSpace(conv(net, "decoder.conv_out", activate(net, "decoder.norm_out", x)), patch);
}

// ---- 3. Transformer ---------------------------------------------------------------------------------------

/** Rows of an embedding table, one for each entry: (1, R, D). */
const embed = (net, name, entries) => each(newMap(1, entries.length, net.config.width), (_, i) =>
    net[`${name}.weight`].v[entries[div(i, net.config.width)] * net.config.width + i % net.config.width]);
const embedToken = (net, m, entry, R) => embed(net, `token_embeddings.${m}`, Array(R).fill(entry));

/** x / sqrt(mean(x^2) + eps) * weight, of each row of x (1, R, D). */
function rmsNorm(net, name, x) {
    const mean = new Float64Array(x.w);
    x.v.forEach((value, i) => mean[div(i, x.c)] += value ** 2 / x.c);
    const {v: weight} = net[`${name}.weight`];
    return each(x, (value, i) => value / Math.sqrt(mean[div(i, x.c)] + 1e-5) * weight[i % x.c]);
}

/** q, k and v side by side (1, R, 3 D) with the pairs of q and k turned, as (a + ib)(cos + i sin), by the
    angles of a position (`rope_table`). At position 0, of the class, the table is 0, and both vanish. */
function rotate(net, qkv, position) {
    const {width, heads} = net.config;
    const table = net.rope[position];                      // (d,): cos and sin of each pair
    return each(qkv, (value, i) => {
        const n = i % (width / heads);
        const sign = n % 2 ? 1 : -1;
        const turned = value * table[n - n % 2] + sign * qkv.v[i - sign] * table[n - n % 2 + 1];
        return i % qkv.c < 2 * width ? turned : value;
    });
}

function softmax(scores) {
    const largest = Math.max(...scores);
    const powers = Array.from(scores, score => Math.exp(score - largest));
    const total = powers.reduce(sum);
    return powers.map(power => power / total);
}

/** softmax(q k^T / sqrt(d)) v for each row and head, the last qkv (1, R, 3 D) over all `past`: (1, R, D). */
function attend(past, D, d) {
    const now = past.at(-1);
    const y = newMap(1, now.w, D);
    for (let i = 0; i < y.v.length; i += d) {              // a head of a row
        const at = div(i, D) * 3 * D + i % D;              // of its q; k lies D further on, v 2 D
        const q = now.v.subarray(at, at + d).map(value => value / Math.sqrt(d));
        const p = softmax(past.map(({v}) => q.reduce((total, value, n) => total + value * v[at + D + n], 0)));
        for (let n = 0; n < d; n++)
            y.v[i + n] = p.reduce((total, share, t) => total + share * past[t].v[at + 2 * D + n], 0);
    }
    return y;
}

/** A LlamaBlock at one position: x (1, R, D) to (1, R, D). past[name] keeps its q, k, v of all positions. */
function block(net, name, x, past, position) {
    const {width, heads} = net.config;
    const qkv = conv(net, `${name}.attention.wqkv`, rmsNorm(net, `${name}.attention_norm`, x));
    (past[name] ??= [])[position] = rotate(net, qkv, position);
    const found = attend(past[name].slice(0, position + 1), width, width / heads);
    x = add(x, conv(net, `${name}.attention.wo`, found));
    const normed = rmsNorm(net, `${name}.ffn_norm`, x);
    const gate = silu(conv(net, `${name}.feed_forward.w1`, normed));
    const hidden = conv(net, `${name}.feed_forward.w3`, normed);
    return add(x, conv(net, `${name}.feed_forward.w2`, each(gate, (value, i) => value * hidden.v[i])));
}

/** Eq. 5: the context C_t (1, R, D) of token t of a drawing {labels, tokens, past}: R labels, the second one
    "no class"; the tokens so far, M sub-tokens each; and for `block`, at first, {}. */
function contextOf(net, {labels, tokens, past}, t) {
    let x = embed(net, "class_embedding", labels);
    if (t > 0)
        x = tokens[t - 1].map((entry, m) => embedToken(net, m, entry, labels.length)).reduce(add);
    for (let i = 0; i < net.config.inter_blocks; i++)
        x = block(net, `inter_blocks.${i}`, x, past, t);
    return x;
}

/** Token t of a drawing, its first sub-tokens those in `fixed`, the others drawn, and from what (eq. 6):
    {token: M, p: M x V}. how: guidance, temperature, topK, and noise(n), that of draw number n. */
function drawToken(net, drawing, t, how, fixed) {
    const [token, p, past] = [[], [], {}];
    let x = contextOf(net, drawing, t);
    net.config.bits.forEach((_, m, {length: M}) => {
        for (let i = 0; i < net.config.intra_blocks; i++)
            x = block(net, `intra_blocks.${i}`, x, past, m);
        p[m] = probabilities(conv(net, `heads.${m}`, rmsNorm(net, "norm", x)), how);
        token[m] = fixed[m] ?? draw(p[m], how.noise(t * M + m));
        x = embedToken(net, m, token[m], drawing.labels.length);
    });
    return {token, p};
}

/** Eq. 7: -log2 p of token t of a drawing, given those before it: its surprise in bits. */
function surpriseOf(net, drawing, t) {
    const token = drawing.tokens[t];
    const {p} = drawToken(net, drawing, t, {guidance: 1, temperature: 1, topK: 0}, token);
    return p.reduce((bits, shares, m) => bits - Math.log2(shares[token[m]]), 0);
}

/** Logits (1, R, V) to V probabilities: guidance, temperature (0: greedy), the top-k likeliest (0: all). */
function probabilities({c: V, v}, {guidance, temperature, topK}) {
    const logits = v.slice(-V).map((logit, i) => logit + guidance * (v[i] - logit));   // last row: no class
    const order = [...logits.keys()].sort((a, b) => logits[b] - logits[a]);          // ties: the lower first
    const kept = new Set(order.slice(0, temperature > 0 ? topK || V : 1));
    return softmax(logits.map((logit, i) => kept.has(i) ? logit / (temperature || 1) : -Infinity));
}

/** The entry of p where its cumulative sum passes `noise`, in [0, 1). */
const draw = (p, noise) => p.findIndex(share => (noise -= share) < 0);

/** Draw number n of a seed, in [0, 1): fixed in advance, so that a seed is a picture (mulberry32). */
function noiseOf(seed, n) {
    let a = Math.imul(seed + 1, 0x9E3779B1) + Math.imul(n + 1, 0x6D2B79F5) | 0;
    a = Math.imul(a ^ a >>> 15, 1 | a);
    a ^= a + Math.imul(a ^ a >>> 7, 61 | a);
    return ((a ^ a >>> 14) >>> 0) / 2 ** 32;
}

// ---- 4. The page ------------------------------------------------------------------------------------------

const $ = id => document.getElementById(id);
const data = JSON.parse($("data").textContent);
const transformer = unpack(data.transformer);
const tokenizers = data.tokenizers.map(unpack);
const {grid} = data;                // {h, w, N: h w}
const percent = p => `${(100 * p).toFixed(p < 0.1 ? 1 : 0)}\u00a0%`;
const pixel = x => i => [0, 1, 2].map(c => (x.v[3 * i + c] + 1) * 127.5);
const heat = x => i => [0, 1, 2].map(c => 255 * (4 * (x.v[3 * i] + x.v[3 * i + 1] + x.v[3 * i + 2]) - c));
const ofId = ids => t => `hsl(${ids[t] * 137.5 % 360} 60% 80%)`;   // it means nothing: an id is a name
const pause = ms => new Promise(done => setTimeout(done, ms));
let seen;           // {net, picture, z, ids: the encoder's, now: changed, plain: ids decoded, t: the chosen}
let drawing;        // as of `contextOf`, and t: the chosen
let playing = false;

/** A canvas of h x w pixels, i of the colour [red, green, blue], 0 to 255. The style sheet enlarges it. */
function paint(canvas, {h, w}, colour) {
    const image = new ImageData(w, h);
    for (let i = 0; i < h * w; i++)
        image.data.set([...colour(i), 255], 4 * i);        // rounds and clamps
    [canvas.width, canvas.height] = [w, h];
    canvas.getContext("2d").putImageData(image, 0, 0);
}

/** A grid of ids or other texts, in the colours of their places, and grey where none is yet. */
function paintGrid(canvas, {h, w}, texts, colourOf) {
    const side = div(512, w);
    [canvas.width, canvas.height] = [w * side, h * side];
    const context = canvas.getContext("2d");
    context.font = `${side * 0.38}px sans-serif`;
    context.textAlign = "center";
    for (let t = 0; t < h * w; t++) {
        const [x, y] = [t % w * side, div(t, w) * side];
        context.fillStyle = t < texts.length ? colourOf(t) : "#8888";
        context.fillRect(x, y, side - 1, side - 1);
        context.fillStyle = "#000";
        context.fillText(side < 40 ? "" : texts[t] ?? "", x + side / 2, y + side * 0.63);
    }
}

/** Frame token t on all canvases below an element, by its style sheet. Returns how to call the token. */
function frame(part, {h, w}, t) {
    const place = {x: t % w / w, y: div(t, w) / h, w: 1 / w, h: 1 / h};
    Object.entries(place).forEach(([name, value]) => part.style.setProperty(`--${name}`, value));
    return `Token ${t} (row ${div(t, w)}, column ${t % w})`;
}

/** Go from token t to that which a click on a canvas or an arrow key means, if it means one. */
function choose(event, {h, w}, t, go) {
    const {key, target, offsetX, offsetY} = event;
    const [row, column] = [div(offsetY * h, target.clientHeight), div(offsetX * w, target.clientWidth)];
    const meant = key ? t + {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -w, ArrowDown: w}[key] : row * w + column;
    if (target.matches("canvas") && meant >= 0 && meant < h * w) {
        event.preventDefault();                            // no scrolling
        go(meant);
    }
}

/** Look at an <img>, or at a photograph's largest square, made small, as tokens of a tokenizer. */
async function look(source, net) {
    const image = await createImageBitmap(source);
    const side = source.naturalWidth ?? data.ownSide;
    const [w, h] = [image.width, image.height].map(size => size * side / Math.min(image.width, image.height));
    const context = new OffscreenCanvas(side, side).getContext("2d");
    context.imageSmoothingQuality = "high";
    context.drawImage(image, (side - w) / 2, (side - h) / 2, w, h);
    const {data: bytes} = context.getImageData(0, 0, side, side);          // red, green, blue, alpha
    const picture = each(newMap(side, side, 3), (_, i) => bytes[div(i, 3) * 4 + i % 3] / 127.5 - 1);
    const z = encode(net, picture);
    const ids = quantise(z);
    seen = {net, picture, z, ids, t: div(z.h, 2) * z.w + div(z.w, 2)};
    $("size").textContent = `${z.h} x ${z.w} of ${z.c} bits, ${z.v.length / 8} bytes for ${side * side * 3}`;
    $("surprise-part").hidden = net !== tokenizers[0];
    $("bits").innerHTML = [...Array(z.c).keys()].map(k => $("bit").innerHTML.replaceAll("{k}", k)).join("");
    change(ids);
}

/** Flip bit k of one token, or of all. */
const flip = (k, only) => change(seen.now.map((id, t) => t === (only ?? t) ? id ^ 1 << k : id));

/** Decode other ids, and show what that changes. */
function change(ids) {
    const {net, picture, z} = seen;
    const now = decode(net, ids, z.h, z.w);
    const edited = ids.some((id, t) => id !== seen.ids[t]);
    seen = {plain: now, ...seen, now: ids};
    const error = each(now, (value, i) => Math.abs(value - (edited ? seen.plain : picture).v[i]));
    paint($("picture"), picture, pixel(picture));
    paint($("decoded"), picture, pixel(now));
    paint($("difference"), picture, heat(error));
    $("between").textContent = edited ? "what your changes did" : "what the tokenizer lost";
    paintGrid($("grid"), z, ids, ofId(ids));
    document.querySelectorAll(".plane canvas").forEach((canvas, k) =>
        paint(canvas, z, t => [0, 1, 2].fill(255 * (ids[t] >> k & 1))));
    tell(seen.t);
    if (net === tokenizers[0])                             // of others, the transformer knows no ids
        pause(0).then(tellSurprise);                       // the picture first, its surprise when it is seen
}

/** Choose token t: its z as bars, its bits as switches. */
function tell(t) {
    const {z, now, ids} = seen;
    const largest = Math.max(...z.v.map(Math.abs));
    const powers = [...Array(z.c).keys()].filter(k => now[t] >> k & 1).map(k => 2 ** k);
    seen.t = t;
    $("token").textContent = `${frame(document.body, z, t)}: id ${now[t]} = ${powers.join(" + ") || 0}`;
    document.querySelectorAll(".bit").forEach((column, k) => {
        const [value, bit] = [z.v[t * z.c + k], now[t] >> k & 1];
        const [number, button] = column.querySelectorAll("small, button");
        number.textContent = value.toFixed(2);
        Object.assign(button, {textContent: bit, ariaPressed: bit === 1});
        column.style.setProperty("--z", Math.abs(value) / largest);
        column.classList.toggle("minus", value <= 0);
        column.classList.toggle("flipped", bit !== (ids[t] >> k & 1));
    });
}

/** How surprising the picture's tokens are to the transformer, under a class: the redder, the more. It tells
    row by row, and until the next question: the page must not wait. */
async function tellSurprise() {
    const [k] = transformer.config.bits;
    const tokens = seen.now.map(id => [id & 2 ** k - 1, id >> k]);         // `ids_to_subtokens`, M = 2
    const asked = {labels: [+$("surprise-class").value], tokens, past: {}};
    const bits = [];
    seen.asked = asked;
    while (seen.asked === asked && bits.length < grid.N) {
        bits.push(surpriseOf(transformer, asked, bits.length));
        if (bits.length % grid.w === 0) {
            const colourOf = t => `hsl(10 90% ${Math.max(50, 97 - 4 * bits[t])}%)`;
            paintGrid($("surprise"), grid, bits.map(each => each.toFixed(1)), colourOf);
            const mean = (bits.reduce(sum) / bits.length).toFixed(2);
            $("surprise-say").textContent = `${mean} bits a token on average; guessing costs ${seen.z.c}.`;
            await pause(0);
        }
    }
}

/** Show token t, its first sub-tokens `fixed` and the others drawn. If that makes another token of it, those
    after it are dropped: the picture takes another way. */
function turn(t, fixed) {
    t = Math.min(t, drawing.tokens.length, grid.N - 1);    // of those that are not drawn yet, the first
    const [guidance, temperature, topK, seed] = [...$("how").elements].map(input => +input.value);
    const how = {guidance, temperature, topK, noise: n => noiseOf(seed, n)};
    const {token, p} = drawToken(transformer, drawing, t, how, fixed ?? drawing.tokens[t] ?? []);
    const changed = `${token}` !== `${drawing.tokens[t]}`;
    if (changed)
        drawing.tokens.splice(t, Infinity, token);
    drawing.t = t;
    const V = 2 ** transformer.config.bits[0];
    const ids = drawing.tokens.map(([first, second]) => first + V * second);         // `subtokens_to_ids`
    const picture = decode(tokenizers[0], ids, grid.h, grid.w);         // to come: decoded as 0, painted grey
    const side = picture.h / grid.h;
    const tokenOf = i => div(i, picture.w * side) * grid.w + div(i % picture.w, side);
    paint($("drawn"), picture, i => tokenOf(i) < ids.length ? pixel(picture)(i) : [136, 136, 136]);
    paintGrid($("drawn-grid"), grid, ids, ofId(ids));
    const [p1, p2] = p.map((shares, m) => shares[token[m]]);
    $("drawn-token").textContent = `${frame($("draw"), grid, t)}: id ${ids[t]} = ${token[0]} + ${V} x ` +
        `${token[1]}. Sub-token 1 is ${token[0]} (${percent(p1)}), sub-token 2, given it, ${token[1]} ` +
        `(${percent(p2)}): both ${percent(p1 * p2)}, ${(-Math.log2(p1 * p2)).toFixed(1)} bits of surprise.`;
    p.forEach((shares, m) => [...$(`bars-${m}`).children].forEach((bar, entry) => {
        const here = entry === token[m];                   // Tab enters a row of bars once, arrows move in it
        Object.assign(bar, {title: percent(shares[entry]), ariaPressed: here, tabIndex: here ? 0 : -1});
        bar.style.setProperty("--p", shares[entry] / Math.max(...shares));
    }));
    if (changed && ids.length === grid.N) {                // finished: kept, to compare with the next
        $("gallery").prepend($("drawn").cloneNode());
        $("gallery").firstChild.getContext("2d").drawImage($("drawn"), 0, 0);
    }
}

function startOver(seed = $("seed").value) {
    $("seed").value = seed;
    drawing = {labels: [+$("class").value, transformer.config.num_classes], tokens: [], past: {}};
    turn(0);
}

/** Draw token after token until somebody presses Pause; from a finished picture on, that of the next seed. */
async function playOrPause() {
    playing = !playing;
    if (drawing.tokens.length === grid.N)
        startOver(+$("seed").value + 1);
    while (playing && drawing.tokens.length < grid.N) {
        $("play").textContent = "Pause";
        turn(drawing.tokens.length);
        await pause(50);
    }
    playing = false;
    $("play").textContent = "Draw";
}

window.play = {unpack, encode, quantise, decode, drawToken, surpriseOf, transformer, tokenizers}; // for tests
startOver();
