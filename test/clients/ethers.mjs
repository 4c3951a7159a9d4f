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
for (const field of Object.keys(typedData.message)) {
  const v = typedData.message[field];
  const changed = v.startsWith("0x") ? v.slice(0, -1) + (v.endsWith("0") ? "1" : "0") : String(BigInt(v) + 1n);
  if (field === "node") continue; // an address has a checksum; compared above
  assert.notEqual(signer({ ...typedData.message, [field]: changed }), node, field);
}
console.log(node);
