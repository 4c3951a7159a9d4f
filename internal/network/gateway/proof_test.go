package gateway

import (
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/resultity/node/internal/network/store"
)

// A client makes few proofs at once, and all clients together not many; what has
// been answered does not count.
func TestProofsAtOnce(t *testing.T) {
	g := &Gateway{proofs: newShares(maxProofs, maxProofsOf)}
	ask := func(client string) *httptest.ResponseRecorder {
		w := httptest.NewRecorder()
		g.proof(w, httptest.NewRequest(http.MethodGet, "/v1/receipts/x/proof", nil), store.Client{Name: client})
		return w
	}
	for range 3 * maxProofs {
		if w := ask("a"); w.Code != http.StatusNotFound {
			t.Fatalf("one at a time: %d %s", w.Code, w.Body)
		}
	}
	hold := func(client string, n int) {
		for range n {
			if !g.proofs.begin(client, 1) {
				t.Fatalf("%s may not make a proof", client)
			}
		}
	}
	full := func(client string) bool {
		w := ask(client)
		return w.Code == http.StatusTooManyRequests && w.Header().Get("Retry-After") == "1"
	}
	hold("a", maxProofsOf)
	if !full("a") || full("b") {
		t.Error("one client has what all may have")
	}
	for _, c := range []string{"b", "c", "d"} {
		hold(c, maxProofsOf)
	}
	if !full("e") {
		t.Error("there is no end")
	}
	g.proofs.end("a", 1)
	if full("a") || full("e") {
		t.Error("what was answered counts")
	}
}
