package snapshot

import (
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/resultity/node/test/oci"
)

func trustedRoot(t *testing.T) string {
	t.Helper()
	s, err := oci.NewSigstore()
	if err != nil {
		t.Fatal(err)
	}
	text, err := s.TrustedRoot()
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func publicKey(t *testing.T) string {
	t.Helper()
	k, err := oci.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	pem, err := k.PublicPEM()
	if err != nil {
		t.Fatal(err)
	}
	return string(pem)
}

func TestKeyless(t *testing.T) {
	text := trustedRoot(t)
	// change returns the root with another value at a path.
	change := func(value any, path ...any) string {
		var doc any
		if err := json.Unmarshal([]byte(text), &doc); err != nil {
			t.Fatal(err)
		}
		at := doc
		for _, p := range path[:len(path)-1] {
			switch p := p.(type) {
			case string:
				at = at.(map[string]any)[p]
			case int:
				at = at.([]any)[p]
			}
		}
		at.(map[string]any)[path[len(path)-1].(string)] = value
		raw, err := json.Marshal(doc)
		if err != nil {
			t.Fatal(err)
		}
		return string(raw)
	}
	// many returns the root with n of an entry.
	many := func(field string, n int) string {
		var doc map[string]any
		if err := json.Unmarshal([]byte(text), &doc); err != nil {
			t.Fatal(err)
		}
		entry := any(map[string]any{})
		if l, _ := doc[field].([]any); len(l) > 0 {
			entry = l[0]
		}
		return change(slices.Repeat([]any{entry}, n), field)
	}
	const email, issuer = "release@example.net", "https://accounts.example.net"
	const ed25519 = "MCowBQYDK2VwAyEAGb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZuE="
	for _, c := range []struct {
		name    string
		keyless Keyless
		want    string // in the error; "" for none
		oneLock bool
	}{
		{"good", Keyless{email, issuer, text}, "", false},
		{"no email", Keyless{"", issuer, text}, "keyless: email", false},
		{"two emails", Keyless{email + "," + email, issuer, text}, "keyless: email", false},
		{"a URI", Keyless{"https://example.net/w.yml@refs/heads/main", issuer, text}, "email is a URI", true},
		{"no issuer", Keyless{email, "", text}, "issuer", false},
		{"an issuer without TLS", Keyless{email, "http://accounts.example.net", text}, "issuer", false},
		{"the longest issuer", Keyless{email, issuer + strings.Repeat("/", maxIssuer-len(issuer)), text}, "", false},
		{"a longer issuer", Keyless{email, issuer + strings.Repeat("/", maxIssuer+1-len(issuer)), text}, "bytes of issuer", false},
		{"no root", Keyless{email, issuer, ""}, "trusted_root: want the text of", false},
		{"half a root", Keyless{email, issuer, text[:len(text)/2]}, "trusted_root: want the text of", false},
		{"a root with more fields", Keyless{email, issuer, change(1, "more")}, "trusted_root: want the text of", false},
		{"the largest root", Keyless{email, issuer, text + strings.Repeat(" ", maxTrustedRoot-len(text))}, "", false},
		{"a larger root", Keyless{email, issuer, text + strings.Repeat(" ", maxTrustedRoot+1-len(text))}, "bytes, want at most 65536", false},
		{"all authorities", Keyless{email, issuer, many("certificateAuthorities", maxAuthorities)}, "", false},
		{"too many authorities", Keyless{email, issuer, many("certificateAuthorities", maxAuthorities+1)}, "number of certificateAuthorities", false},
		{"too many logs", Keyless{email, issuer, many("tlogs", maxAuthorities+1)}, "number of tlogs", false},
		{"too many logs of certificates", Keyless{email, issuer, many("ctlogs", maxAuthorities+1)}, "number of ctlogs", false},
		{"too many timestamp authorities", Keyless{email, issuer, many("timestampAuthorities", maxAuthorities+1)}, "number of timestampAuthorities", false},
		{"no authority", Keyless{email, issuer, change([]any{}, "certificateAuthorities")}, "number of certificateAuthorities", false},
		{"an authority without certificates", Keyless{email, issuer, change([]any{}, "certificateAuthorities", 0, "certChain", "certificates")}, "number of certificates", false},
		{"no certificate", Keyless{email, issuer, change("AAAA", "certificateAuthorities", 0, "certChain", "certificates", 0, "rawBytes")}, "certificateAuthorities[0]", false},
		{"no log", Keyless{email, issuer, change([]any{}, "tlogs")}, "number of tlogs", false},
		{"no key of a log", Keyless{email, issuer, change("AAAA", "tlogs", 0, "publicKey", "rawBytes")}, "tlogs[0]", false},
		{"a log that Podman cannot check", Keyless{email, issuer, change(ed25519, "tlogs", 0, "publicKey", "rawBytes")}, "tlogs[0]: ed25519.PublicKey", true},
	} {
		raw := edit(t, map[string]any{"keys": []any{}, "revoked": []any{}, "keyless": c.keyless}, "image_trust")
		got, err := Parse(raw)
		switch {
		case c.want == "" && (err != nil || *got.ImageTrust.Keyless != c.keyless):
			t.Errorf("%s: %+v, %v", c.name, got, err)
		case c.want != "" && (!errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), c.want) || errors.Is(err, ErrOneLock) != c.oneLock):
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
		}
	}
}

// What an older configuration trusts counts only as far as the newest does.
func TestUnder(t *testing.T) {
	a, b, c := publicKey(t), publicKey(t), publicKey(t)
	id := &Keyless{Email: "a@example.net", Issuer: "https://example.net", TrustedRoot: "1"}
	newer, other := *id, *id
	newer.TrustedRoot, other.Email = "2", "b@example.net"
	for _, tt := range []struct {
		name             string
		own, now         ImageTrust
		still, gone      string
		keyless, without *Keyless
	}{
		{"the same", ImageTrust{Keys: []string{a, b}}, ImageTrust{Keys: []string{b, a}}, a + b, "", nil, nil},
		{"another spelling", ImageTrust{Keys: []string{a}}, ImageTrust{Keys: []string{strings.TrimSpace(a)}}, a, "", nil, nil},
		{"one more", ImageTrust{Keys: []string{a}}, ImageTrust{Keys: []string{a, c}}, a, "", nil, nil},
		{"one gone", ImageTrust{Keys: []string{a, b}}, ImageTrust{Keys: []string{b}}, b, a, nil, nil},
		{"one revoked", ImageTrust{Keys: []string{a, b}}, ImageTrust{Keys: []string{b}, Revoked: []string{a}}, b, a, nil, nil},
		{"revoked before", ImageTrust{Keys: []string{a}, Revoked: []string{c}}, ImageTrust{Keys: []string{a}}, a, c, nil, nil},
		{"to keyless", ImageTrust{Keys: []string{a}}, ImageTrust{Keyless: id}, "", a, nil, nil},
		{"a newer root", ImageTrust{Keyless: id}, ImageTrust{Keyless: &newer}, "", "", &newer, nil},
		{"another identity", ImageTrust{Keyless: id}, ImageTrust{Keyless: &other}, "", "", nil, id},
		{"from keyless", ImageTrust{Keyless: id}, ImageTrust{Keys: []string{a}}, "", "", nil, id},
	} {
		still, gone := tt.own.Under(&tt.now)
		if s, g := strings.Join(still.Keys, ""), strings.Join(gone.Keys, ""); s != tt.still || g != tt.gone || still.Keyless != tt.keyless || gone.Keyless != tt.without {
			t.Errorf("%s: still %+v, gone %+v", tt.name, still, gone)
		}
	}
}
