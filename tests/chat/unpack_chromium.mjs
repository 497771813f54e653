// Unpacks the browser of the npm package @sparticuz/chromium: node unpack_chromium.mjs DIRECTORY
import { execFileSync } from "node:child_process";
import { mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { resolve } from "node:path";
import { brotliDecompressSync } from "node:zlib";

const directory = resolve(process.argv[2]);
const packed = `${directory}/node_modules/@sparticuz/chromium/bin`;
const unpacked = (name) => brotliDecompressSync(readFileSync(`${packed}/${name}.br`));

writeFileSync(`${directory}/chromium`, unpacked("chromium"), { mode: 0o755 });
mkdirSync(`${directory}/fonts`, { recursive: true });
const places = { "al2023.tar": directory, "swiftshader.tar": directory, "fonts.tar": `${directory}/fonts` };
for (const [name, place] of Object.entries(places)) {
  writeFileSync(`${directory}/${name}`, unpacked(name));
  execFileSync("tar", ["xf", `${directory}/${name}`, "-C", place]);
}
writeFileSync(
  `${directory}/fonts.conf`,
  `<?xml version="1.0"?><!DOCTYPE fontconfig SYSTEM "fonts.dtd"><fontconfig>
<dir>${directory}/fonts</dir><dir>/usr/share/fonts</dir>
<cachedir>${directory}/fonts-cache</cachedir></fontconfig>\n`,
);
