package clients

import (
	"encoding/json"
	"testing"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/receipt"
)

// A receipt holds for code that has never heard of us.
func TestEthersVerifiesReceipt(t *testing.T) {
	key, err := evm.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	d := func(s string) digest.Digest { return digest.Of([]byte(s)) }
	r := receipt.Receipt{
		Job: receipt.NewJobID(), Node: key.Address(),
		ConfigDigest: d("config"), ImageDigest: d("image"), ModelDigest: d("model"), RequestHash: d("request"), ResponseHash: d("response"),
		PromptTokens: 12, CompletionTokens: 1 << 60, StartedAt: 1_800_000_000_000, FinishedAt: 1_800_000_000_123,
	}
	s, err := r.Sign(31337, key)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	got, err := Run(t.Context(), "ethers.mjs", raw)
	if err != nil {
		t.Fatal(err)
	}
	if got != key.Address().Hex() {
		t.Errorf("ethers says %s, want %s", got, key.Address().Hex())
	}
}
