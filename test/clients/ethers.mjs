// Verifies what a node has signed (JSON on stdin) with ethers alone, and that
// nothing changed passes. Prints the signer.
import { verifyTypedData, TypedDataEncoder } from "ethers";
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";

const { typedData, signature, node } = JSON.parse(readFileSync(0, "utf8"));
const { EIP712Domain, ...types } = typedData.types;
assert.deepEqual(
  EIP712Domain.map((f) => f.name),
  ["name", "version", "chainId"],
);
assert.equal(TypedDataEncoder.from(types).primaryType, typedData.primaryType);

const signer = (message) => verifyTypedData(typedData.domain, types, message, signature);
assert.equal(signer(typedData.message), node);
assert.equal(typedData.message.node, node);
// Each single value is changed, also within structs.
const change = (struct, message) => {
  for (const [field, v] of Object.entries(struct)) {
    if (field === "node") continue; // an address has a checksum; compared above
    const put = (w) => message({ ...struct, [field]: w });
    if (typeof v === "object") {
      change(v, put);
      continue;
    }
    const changed = v.startsWith("0x") ? v.slice(0, -1) + (v.endsWith("0") ? "1" : "0") : /^\d+$/.test(v) ? String(BigInt(v) + 1n) : v + "x";
    assert.notEqual(signer(put(changed)), node, field);
  }
};
change(typedData.message, (m) => m);
console.log(node);
