package clients

import (
	"encoding/json"
	"fmt"
	"testing"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/receipt"
	"github.com/resultity/node/internal/receiptlog"
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
		Measured: receipt.Measured{
			ConfigDigest: d("config"), ImageDigest: d("image"), ModelDigest: d("model"), SandboxDigest: d("sandbox"),
			RequestHash: d("request"), ResponseHash: d("response"),
		},
		Claimed: receipt.Claimed{ClassDigest: d("class"), PromptTokens: 12, CompletionTokens: 1 << 60, StartedAt: 1_800_000_000_000, FinishedAt: 1_800_000_000_123},
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

// So does the head of a log of receipts.
func TestEthersVerifiesHead(t *testing.T) {
	key, err := evm.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	h := receiptlog.Head{Node: key.Address(), Network: "testnet", Era: 1_700_000_000_000, Size: 1 << 40, Root: evm.Keccak([]byte("root")), Time: 1_800_000_000_000}
	s, err := h.Sign(31337, key)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := json.Marshal(map[string]any{
		"node": key.Address().Hex(), "signature": s.Signature,
		"typedData": map[string]any{
			"types":       map[string]any{"EIP712Domain": evm.DomainFields(), "ReceiptLogHead": receiptlog.HeadFields()},
			"primaryType": "ReceiptLogHead",
			"domain":      map[string]any{"name": evm.DomainName, "version": evm.DomainVersion, "chainId": 31337},
			"message":     map[string]string{"node": key.Address().Hex(), "network": h.Network, "era": fmt.Sprint(h.Era), "size": fmt.Sprint(h.Size), "root": h.Root.Hex(), "time": fmt.Sprint(h.Time)},
		},
	})
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
