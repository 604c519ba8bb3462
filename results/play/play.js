/* Tokenizer and transformer in a browser: what tokenizer.py, ar_model.py and sample.py do, in plain loops.

    1. layers        convolution, norms, depth-to-space
    2. tokenizer     encoder, signs, ids, decoder (eq. 1, 2)
    3. transformer   Llama blocks with a cache, sub-tokens, drawing (eq. 5 to 7)
    4. the page      painting; flip bits; draw token by token, take another way; surprise

A map is {h, w, c, v}: v holds h x w places of c channels, channels last, so that the numbers of a place are
neighbours: (h, w, C) is what torch has as (C, h, w). Rows of a batch are places, too: (1, R, D). `net` is a
model's config and its weights, named as in torch. All is float64: JavaScript computes in it anyway, and would
convert every number of a float32 array, which takes longer than the products. Letters: as in the Python. */
"use strict";

// ---- 1. Layers --------------------------------------------------------------------------------------------

const newMap = (h, w, c) => ({h, w, c, v: new Float64Array(h * w * c)});
const each = (x, change) => ({...x, v: x.v.map(change)});                  // a number of x at a time
const add = (x, y) => each(x, (value, i) => value + y.v[i]);
const silu = x => each(x, value => value / (1 + Math.exp(-value)));

/** A model of the page's data: its config, and weights {shape, v} from half floats. */
function unpack({config, rope, layout, halves}) {
    const numbers = Float64Array.from(new Float16Array(Uint8Array.fromBase64(halves).buffer));
    const net = {config, rope};
    let end = 0;
    for (const [name, shape] of layout)
        net[name] = {shape, v: numbers.subarray(end, end += shape.reduce((product, size) => product * size))};
    return net;
}

/** The k x k places around a place of x, zeros beyond the edge, as its channels: (h / stride, .., k k C). */
function neighbourhoods(x, k, stride) {
    const y = newMap(Math.ceil(x.h / stride), Math.ceil(x.w / stride), k * k * x.c);
    for (let i = 0; i < y.v.length; i += x.c) {            // neighbour n of a place
        const n = i % y.c / x.c;
        const place = Math.floor(i / y.c);
        const row = Math.floor(place / y.w) * stride + Math.floor(n / k) - (k >> 1);
        const column = place % y.w * stride + n % k - (k >> 1);
        const from = (row * x.w + column) * x.c;
        if (row >= 0 && row < x.h && column >= 0 && column < x.w)
            y.v.set(x.v.subarray(from, from + x.c), i);
    }
    return y;
}

/** nn.Conv2d of a weight (O, k, k, C), for k = 1 also nn.Linear: (h, w, C) to (h / stride, w / stride, O). */
function conv(net, name, x, stride = 1) {
    const {shape: [O, k], v: weight} = net[`${name}.weight`];
    const bias = net[`${name}.bias`];
    const {h, w, c: C, v: input} = k === 1 ? x : neighbourhoods(x, k, stride);
    const y = newMap(h, w, O);
    for (let i = 0; i < y.v.length; i++) {                 // one long dot product: all time is spent here
        const from = Math.floor(i / O) * C;
        const o = i % O;
        let sum = bias ? bias.v[o] : 0;
        for (let c = 0; c < C; c++)
            sum += input[from + c] * weight[o * C + c];
        y.v[i] = sum;
    }
    return y;
}

/** GroupNorm: each of 32 groups of channels to mean 0 and variance 1, then times `gamma` plus `beta` (C). */
function groupNorm(x, gamma, beta) {
    const groupOf = i => Math.floor(i % x.c * 32 / x.c);
    const mean = new Float64Array(32);
    const variance = new Float64Array(32);
    x.v.forEach((value, i) => mean[groupOf(i)] += value * 32 / x.v.length);
    x.v.forEach((value, i) => variance[groupOf(i)] += (value - mean[groupOf(i)]) ** 2 * 32 / x.v.length);
    const normed = each(x, (value, i) => (value - mean[groupOf(i)]) / Math.sqrt(variance[groupOf(i)] + 1e-6));
    return each(normed, (value, i) => value * gamma[i % x.c] + beta[i % x.c]);
}

/** GroupNorm with learned gamma and beta, then SiLU. */
const activate = (net, name, x) => silu(groupNorm(x, net[`${name}.weight`].v, net[`${name}.bias`].v));

/** AdaptiveGroupNorm: gamma and beta come from std and mean of each bit over ALL tokens q (h, w, K). */
function adaptiveNorm(net, name, x, q) {
    const N = q.h * q.w;
    const mean = newMap(1, 1, q.c);
    const variance = newMap(1, 1, q.c);
    q.v.forEach((value, i) => mean.v[i % q.c] += value / N);
    q.v.forEach((value, i) => variance.v[i % q.c] += (value - mean.v[i % q.c]) ** 2 / (N - 1));
    const std = each(variance, value => Math.sqrt(value + 1e-6));
    return groupNorm(x, conv(net, `${name}.gamma`, std).v, conv(net, `${name}.beta`, mean).v);
}

/** Where number i of a map (H, W, C) lies once p x p of its pixels are one place (H / p, W / p, p p C): channel
    c of pixel (dy, dx) is the place's channel (dy p + dx) C + c. */
function deepIndex({w, c: C}, p, i) {
    const [row, column] = [Math.floor(i / C / w), Math.floor(i / C) % w];
    const place = Math.floor(row / p) * w / p + Math.floor(column / p);
    return ((place * p + row % p) * p + column % p) * C + i % C;
}

function spaceToDepth(x, p) {                              // (H, W, C) to (H / p, W / p, p p C)
    const y = newMap(x.h / p, x.w / p, x.c * p ** 2);
    x.v.forEach((value, i) => y.v[deepIndex(x, p, i)] = value);
    return y;
}

function depthToSpace(x, p) {                              // and back
    const y = newMap(x.h * p, x.w * p, x.c / p ** 2);
    return each(y, (_, i) => x.v[deepIndex(y, p, i)]);
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
    let x = conv(net, "encoder.conv_in", spaceToDepth(picture, patch));
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
    z.v.forEach((value, i) => ids[Math.floor(i / z.c)] += value > 0 ? 2 ** (i % z.c) : 0);
    return ids;
}

/** Decoder: h x w ids to a picture (H, W, 3) in about [-1, 1]. */
function decode(net, ids, h, w) {
    const {bits: K, patch, blocks, mid_blocks, channel_multipliers: {length: levels}} = net.config;
    const q = each(newMap(h, w, K), (_, i) => ids[Math.floor(i / K)] >> i % K & 1 ? 1 : -1);
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
function embed(net, name, entries) {
    const {width: D} = net.config;
    const table = net[`${name}.weight`].v;
    return each(newMap(1, entries.length, D), (_, i) => table[entries[Math.floor(i / D)] * D + i % D]);
}

/** x / sqrt(mean(x^2) + eps) * weight, of each row of x (1, R, D). */
function rmsNorm(net, name, x) {
    const mean = new Float64Array(x.w);
    x.v.forEach((value, i) => mean[Math.floor(i / x.c)] += value ** 2 / x.c);
    const normed = each(x, (value, i) => value / Math.sqrt(mean[Math.floor(i / x.c)] + 1e-5));
    return each(normed, (value, i) => value * net[`${name}.weight`].v[i % x.c]);
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
    const sum = powers.reduce((a, b) => a + b);
    return powers.map(power => power / sum);
}

/** softmax(q k^T / sqrt(d)) v for each row and head: of the last qkv (1, R, 3 D) over all `past`: (1, R, D). */
function attend(past, D, d) {
    const now = past.at(-1).v;
    const y = newMap(1, past.at(-1).w, D);
    for (let i = 0; i < y.v.length; i += d) {              // a head of a row
        const at = Math.floor(i / D) * 3 * D + i % D;      // of its q; k lies D further on, v 2 D
        const dot = k => now.subarray(at, at + d).reduce((sum, q, n) => sum + q * k[at + D + n], 0);
        const p = softmax(past.map(({v}) => dot(v) / Math.sqrt(d)));
        for (let n = 0; n < d; n++)
            y.v[i + n] = p.reduce((sum, share, t) => sum + share * past[t].v[at + 2 * D + n], 0);
    }
    return y;
}

/** A LlamaBlock at one position: x (1, R, D) to (1, R, D). past[name] keeps its q, k, v of all positions. */
function block(net, name, x, past, position) {
    const {width, heads} = net.config;
    const qkv = conv(net, `${name}.attention.wqkv`, rmsNorm(net, `${name}.attention_norm`, x));
    past[name] ??= [];
    past[name][position] = rotate(net, qkv, position);
    const found = attend(past[name].slice(0, position + 1), width, width / heads);
    x = add(x, conv(net, `${name}.attention.wo`, found));
    const normed = rmsNorm(net, `${name}.ffn_norm`, x);
    const gate = silu(conv(net, `${name}.feed_forward.w1`, normed));
    const hidden = conv(net, `${name}.feed_forward.w3`, normed);
    return add(x, conv(net, `${name}.feed_forward.w2`, each(gate, (value, i) => value * hidden.v[i])));
}

/** Eq. 5: the context C_t (1, 2, D) of token t. Row 0 knows the class, row 1 does not.
    drawing: {label, tokens: so far, M sub-tokens each, past: {}}. */
function contextOf(net, {label, tokens, past}, t) {
    let x = embed(net, "class_embedding", [label, net.config.num_classes]);
    if (t > 0)
        x = tokens[t - 1].map((entry, m) => embed(net, `token_embeddings.${m}`, [entry, entry])).reduce(add);
    for (let i = 0; i < net.config.inter_blocks; i++)
        x = block(net, `inter_blocks.${i}`, x, past, t);
    return x;
}

/** Eq. 6: logits (1, 2, V) of the next sub-token of a token, from its context and the sub-tokens so far. */
function logitsOf(net, context, given) {
    const past = {};
    let x = context;
    for (let m = 0; m <= given.length; m++) {
        if (m > 0)
            x = embed(net, `token_embeddings.${m - 1}`, [given[m - 1], given[m - 1]]);
        for (let i = 0; i < net.config.intra_blocks; i++)
            x = block(net, `intra_blocks.${i}`, x, past, m);
    }
    return conv(net, `heads.${given.length}`, rmsNorm(net, "norm", x));
}

/** Two rows of logits to V probabilities: guidance, temperature (0: greedy), the top-k likeliest (0: all). */
function probabilities({c: V, v}, {guidance, temperature, topK}) {
    const logits = v.slice(0, V).map((logit, i) => v[V + i] + guidance * (logit - v[V + i]));
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

/** Token t, its first sub-tokens those in `fixed`, the others drawn, and from what: {token: M, p: M x V}.
    how: guidance, temperature, topK, and noise(n), that of draw number n. */
function drawToken(net, drawing, t, how, fixed) {
    const context = contextOf(net, drawing, t);
    const token = [];
    const p = net.config.bits.map((_, m, {length: M}) => {
        const found = probabilities(logitsOf(net, context, token), how);
        token.push(fixed[m] ?? draw(found, how.noise(t * M + m)));
        return found;
    });
    return {token, p};
}

/** Eq. 7: -log2 p of each token of ids under a class, given those before it: its surprise in bits. */
function surpriseOf(net, label, ids) {
    const [k] = net.config.bits;
    const tokens = ids.map(id => [id & 2 ** k - 1, id >> k]);              // `ids_to_subtokens`, M = 2
    const drawing = {label, tokens, past: {}};
    return tokens.map((token, t) => {
        const {p} = drawToken(net, drawing, t, {guidance: 1, temperature: 1, topK: 0}, token);
        return -Math.log2(p[0][token[0]]) - Math.log2(p[1][token[1]]);
    });
}

// ---- 4. The page -------------------------------------------------------------------------------------------

const $ = id => document.getElementById(id);
const data = JSON.parse($("data").textContent);
const transformer = unpack(data.transformer);
const tokenizers = data.tokenizers.map(unpack);
const [h, w] = transformer.config.grid;
const grid = {h, w, N: h * w};
const percent = p => `${(100 * p).toFixed(p < 0.1 ? 1 : 0)} %`;
const pixel = x => i => [0, 1, 2].map(c => (x.v[3 * i + c] + 1) * 127.5);
const heat = (x, most) => i => [0, 1, 2].map(c => 255 * (3 * x[i] / most - c));    // black, red, yellow, white
let seen;           // {net, picture, z, ids: the encoder's, now: as flipped, plain: ids decoded, t: the chosen}
let drawing;        // as of `contextOf`, and t: the chosen
let playing = false;

/** A canvas of h x w pixels, pixel i of the colour [red, green, blue], 0 to 255; the style sheet enlarges it. */
function paint(canvas, {h, w}, colour) {
    const image = new ImageData(w, h);
    for (let i = 0; i < h * w; i++)
        image.data.set([...colour(i), 255], 4 * i);        // rounds and clamps
    [canvas.width, canvas.height] = [w, h];
    canvas.getContext("2d").putImageData(image, 0, 0);
}

/** A grid of ids, grey where none is yet: a colour each (means nothing: an id is a name), and its number. */
function paintGrid(canvas, {h, w}, ids) {
    const side = Math.floor(512 / w);
    [canvas.width, canvas.height] = [w * side, h * side];
    const context = canvas.getContext("2d");
    context.font = `${side * 0.38}px sans-serif`;
    context.textAlign = "center";
    for (let t = 0; t < h * w; t++) {
        const [x, y] = [t % w * side, Math.floor(t / w) * side];
        context.fillStyle = t < ids.length ? `hsl(${ids[t] * 137.5 % 360} 60% 80%)` : "#8888";
        context.fillRect(x, y, side - 1, side - 1);
        context.fillStyle = "#000";
        context.fillText(side < 40 ? "" : ids[t] ?? "", x + side / 2, y + side * 0.63);
    }
}

/** Frame token t on all canvases below an element; the style sheet draws it. Returns how to call the token. */
function frame(id, {h, w}, t) {
    const place = {x: t % w / w, y: Math.floor(t / w) / h, w: 1 / w, h: 1 / h};
    Object.entries(place).forEach(([name, value]) => $(id).style.setProperty(`--${name}`, value));
    return `Token ${t} (row ${Math.floor(t / w)}, column ${t % w})`;
}

/** Go from token t to that which a click on a canvas or an arrow key means, if it means one. */
function choose(event, {h, w}, t, go) {
    const {key, target, offsetX, offsetY} = event;
    const clicked = Math.floor(offsetY / target.clientHeight * h) * w + Math.floor(offsetX / target.clientWidth * w);
    const meant = key ? t + {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -w, ArrowDown: w}[key] : clicked;
    if (target.matches("canvas") && meant >= 0 && meant < h * w) {
        event.preventDefault();                            // no scrolling
        go(meant);
    }
}

/** Look at a picture of `side` x `side` bytes, `channels` a pixel, as tokens of a tokenizer. */
function look(net, bytes, side, channels) {
    const picture = each(newMap(side, side, 3),
                         (_, i) => bytes[Math.floor(i / 3) * channels + i % 3] / 127.5 - 1);
    const z = encode(net, picture);
    const {h, w, c: K} = z;
    const ids = quantise(z);
    seen = {net, picture, z, ids, plain: decode(net, ids, h, w), t: Math.floor(h / 2) * w + Math.floor(w / 2)};
    $("size").textContent = `${h} x ${w} of ${K} bits: ${h * w * K / 8} bytes in place of ${picture.v.length}`;
    $("bits").replaceChildren(...Array.from({length: K}, () => $("bit").content.cloneNode(true)));
    document.querySelectorAll(".switch").forEach((button, k) => button.onclick = () => flip(k, seen.t));
    document.querySelectorAll(".plane").forEach((button, k) => button.onclick = () => flip(k));
    change(ids);
}

/** Picture i of tokenizer n. */
function lookAt(n, i) {
    $("surprise-class").value = i;                         // pictures are in the order of classes
    look(tokenizers[n], Uint8Array.fromBase64(data.tokenizers[n].pictures[i]), data.tokenizers[n].side, 3);
}

/** A photograph's largest square, made small, as tokens of the last tokenizer. */
async function lookAtFile(file) {
    const image = await createImageBitmap(file).catch(() => alert("The browser cannot read this as a picture."));
    if (!image)
        return;
    const size = Math.min(image.width, image.height);
    const {ownSide: side} = data.tokenizers.at(-1);
    const context = new OffscreenCanvas(side, side).getContext("2d");
    context.imageSmoothingQuality = "high";
    context.drawImage(image, (image.width - size) / 2, (image.height - size) / 2, size, size, 0, 0, side, side);
    look(tokenizers.at(-1), context.getImageData(0, 0, side, side).data, side, 4);
}

/** Flip bit k of one token, or of all. */
function flip(k, only) {
    change(seen.now.map((id, t) => t === (only ?? t) ? id ^ 1 << k : id));
}

/** Decode other ids, and show what that changes. */
function change(ids) {
    const {net, picture, z, plain} = seen;
    const edited = ids.some((id, t) => id !== seen.ids[t]);
    const now = decode(net, ids, z.h, z.w);
    const error = each(now, (value, i) => Math.abs(value - (edited ? plain : picture).v[i]));
    seen.now = ids;
    paint($("picture"), picture, pixel(picture));
    paint($("decoded"), picture, pixel(now));
    paint($("difference"), picture, i => heat([error.v[3 * i] + error.v[3 * i + 1] + error.v[3 * i + 2]], 3)(0));
    $("between").textContent = edited ? "what your changes did" : "what the tokenizer lost";
    paintGrid($("grid"), z, ids);
    document.querySelectorAll(".plane canvas").forEach((canvas, k) =>
        paint(canvas, z, t => [0, 1, 2].fill(255 * (ids[t] >> k & 1))));
    tell(seen.t);
    clearTimeout(seen.later);                              // the picture first, its surprise when there is time
    seen.later = setTimeout(tellSurprise, 100);
}

/** Choose token t: its z as bars, its bits as switches. */
function tell(t) {
    const {z, now, ids} = seen;
    const largest = Math.max(...z.v.map(Math.abs));
    const powers = [...Array(z.c).keys()].filter(k => now[t] >> k & 1).map(k => 2 ** k);
    seen.t = t;
    $("token").textContent = `${frame("tokens", z, t)}: id ${now[t]} = ${powers.join(" + ") || 0}`;
    document.querySelectorAll(".bit").forEach((column, k) => {
        const value = z.v[t * z.c + k];
        const bit = now[t] >> k & 1;
        const [name, number, button, plane] = column.querySelectorAll("b, small, button");
        name.textContent = `bit ${k}`;
        number.textContent = value.toFixed(2);
        button.textContent = bit;
        button.ariaPressed = bit === 1;
        button.ariaLabel = `bit ${k} of this token`;
        plane.ariaLabel = `flip bit ${k} of all tokens`;
        column.classList.toggle("flipped", bit !== (ids[t] >> k & 1));
        column.classList.toggle("minus", value <= 0);
        column.style.setProperty("--z", Math.abs(value) / largest);
    });
}

/** How surprising the picture of part 1 is, if it has a grid that the transformer knows. */
function tellSurprise() {
    const known = seen.net === tokenizers[0] && seen.now.length === grid.N;
    $("surprise-part").hidden = !known;
    if (!known)
        return;
    const bits = surpriseOf(transformer, +$("surprise-class").value, seen.now);
    const mean = bits.reduce((a, b) => a + b) / bits.length;
    paint($("surprise"), seen.z, heat(bits, 20));
    $("surprise-say").textContent = `${mean.toFixed(2)} bits a token: blind guessing would cost ${seen.z.c}. ` +
        `The chosen token, ${seen.t}: ${bits[seen.t].toFixed(1)} bits.`;
}

/** Show token t, its first sub-tokens `fixed` and the others drawn. Where that makes another token of it, those
    after it are dropped: the picture takes another way. */
function turn(t, fixed = drawing.tokens[t] ?? []) {
    if (t > Math.min(drawing.tokens.length, grid.N - 1))   // not all before it are drawn
        return;
    const [temperature, guidance, topK, seed] = ["temperature", "guidance", "topk", "seed"].map(id => +$(id).value);
    const how = {temperature, guidance, topK, noise: n => noiseOf(seed, n)};
    const {token, p} = drawToken(transformer, drawing, t, how, fixed);
    const changed = `${token}` !== `${drawing.tokens[t]}`;
    if (changed)
        drawing.tokens.splice(t, Infinity, token);
    drawing.t = t;
    const [k] = transformer.config.bits;
    const ids = drawing.tokens.map(([first, second]) => first + 2 ** k * second);    // `subtokens_to_ids`
    const picture = decode(tokenizers[0], ids, grid.h, grid.w);            // to come: decoded as 0, painted grey
    const stride = picture.h / grid.h;
    const tokenOf = i => Math.floor(i / picture.w / stride) * grid.w + Math.floor(i % picture.w / stride);
    paint($("drawn"), picture, i => tokenOf(i) < ids.length ? pixel(picture)(i) : [136, 136, 136]);
    paintGrid($("drawn-grid"), grid, ids);
    const [p1, p2] = p.map((shares, m) => shares[token[m]]);
    $("drawn-token").textContent = `${frame("draw", grid, t)}: sub-token 1 is ${token[0]} ` +
        `(${percent(p1)}), sub-token 2 is ${token[1]} (${percent(p2)}): id ${token[0]} + ${2 ** k} x ` +
        `${token[1]} = ${ids[t]}, a surprise of ${(-Math.log2(p1 * p2)).toFixed(1)} bits.`;
    p.forEach((shares, m) => [...$(`bars-${m}`).children].forEach((bar, entry) => {
        bar.style.setProperty("--p", shares[entry] / Math.max(...shares));
        bar.title = `${entry}: ${percent(shares[entry])}`;
        bar.ariaPressed = entry === token[m];
        bar.tabIndex = entry === token[m] ? 0 : -1;        // Tab enters a row of bars once, arrows move in it
    }));
    if (changed && ids.length === grid.N) {        // finished: kept, to compare with the next
        $("gallery").prepend($("drawn").cloneNode());
        $("gallery").firstChild.getContext("2d").drawImage($("drawn"), 0, 0);
    }
}

/** Go on from another entry of sub-token m of the chosen token. */
function take(m, bar) {
    const entry = [...bar.parentNode.children].indexOf(bar);
    if (bar.matches("button"))
        turn(drawing.t, [...drawing.tokens[drawing.t].slice(0, m), entry]);
}

function startOver() {
    drawing = {label: +$("class").value, tokens: [], past: {}};
    turn(0);
}

/** Draw token after token until somebody presses Pause; from a finished picture on, that of the next seed. */
async function playOrPause() {
    playing = !playing;
    if (drawing.tokens.length === grid.N) {
        $("seed").value = +$("seed").value + 1;
        startOver();
    }
    while (playing && drawing.tokens.length < grid.N) {
        $("play").textContent = "Pause";
        turn(drawing.tokens.length);
        await new Promise(done => setTimeout(done, 50));
    }
    playing = false;
    $("play").textContent = "Draw";
}

window.play = {transformer, tokenizers, encode, quantise, decode, drawToken, surpriseOf};    // for tests
lookAt(0, 4);
startOver();
