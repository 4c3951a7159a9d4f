package e2e

import (
	"context"
	"fmt"
	"net"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/resultity/node/internal/control"
	"github.com/resultity/node/internal/evm"
	"github.com/resultity/node/internal/gate"
	"github.com/resultity/node/test/clients"
	"github.com/resultity/node/test/stack"
)

// smtpd is OpenSMTPD's configuration: STARTTLS or nothing, mail for this host
// into the users' own directories.
const smtpd = `pki net cert "/etc/resultity-network/tls.crt"
pki net key "/etc/resultity-network/tls.key"
listen on 0.0.0.0 port 25 tls-require pki net
action "local" maildir
match from any for domain "net" action "local"
`

// startMail gives the network's host a mail server and a user, and the network
// service a configuration that names it.
func startMail(t *testing.T) {
	t.Helper()
	on(t, "useradd", "--create-home", "ann")
	addr := s.Net.Addr().String()
	for name, text := range map[string]string{
		"/etc/smtpd.conf":                  smtpd,
		"/etc/systemd/system/mail.service": "[Service]\nExecStart=/usr/sbin/smtpd -d -f /etc/smtpd.conf\n",
		"/etc/resultity-network/network.toml": fmt.Sprintf("listen = \":8443\"\ntls_cert = \"/etc/resultity-network/tls.crt\"\ntls_key = \"/etc/resultity-network/tls.key\"\n"+
			"smtp = %q\nsmtp_from = \"The demo <codes@net>\"\nsmtp_ca = \"/etc/resultity-network/ca.pem\"\n", net.JoinHostPort(addr, "25")),
	} {
		if err := s.Net.WriteFile(name, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	on(t, "systemctl", "daemon-reload")
	on(t, "systemctl", "start", "mail.service")
	on(t, "systemctl", "restart", "resultity-network.service")
}

// on runs a program on the network's host.
func on(t *testing.T, args ...string) string {
	t.Helper()
	out, err := s.Net.Output(t.Context(), args...)
	if err != nil {
		t.Fatalf("%s: %v: %s", args, err, out)
	}
	return string(out)
}

var code = regexp.MustCompile(`(?m)^([0-9]{8})\r?$`)

// mailed waits for the code in the mail that was delivered.
func mailed(t *testing.T) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	for {
		out, err := s.Net.Output(ctx, "sh", "-c", "cat /home/ann/Maildir/new/* 2>/dev/null || true")
		if m := code.FindSubmatch(out); m != nil {
			return string(m[1])
		}
		select {
		case <-ctx.Done():
			t.Fatalf("no mail (%v): %s\n%s\n%s", err, out, on(t, "journalctl", "--no-pager", "-n", "30", "-u", "mail"), on(t, "journalctl", "--no-pager", "-n", "30", "-u", "resultity-network"))
		case <-time.After(100 * time.Millisecond): // a delivery sends no event
		}
	}
}

// A node is taken from its account, bound by a code that a real mail server has
// delivered, and then by a wallet; without an account it gets no jobs, and is
// told so.
func TestBinding(t *testing.T) {
	startMail(t)
	n := s.Nodes[1]
	ctl := func(args ...string) string {
		t.Helper()
		out, err := n.Ctl(t.Context(), args...)
		if err != nil {
			t.Fatalf("resultityctl %s: %v: %s", args, err, out)
		}
		return string(out)
	}
	unbind := func() {
		t.Helper()
		ctl("unbind")
		if err := n.WaitStatus(t.Context(), "being told that it has no account", func(st *control.Status) bool {
			for _, g := range st.Gates {
				if g.Name == gate.Routable && g.State != gate.Open && strings.Contains(g.Detail, "no account") {
					return !st.GetsJobs()
				}
			}
			return false
		}); err != nil {
			t.Fatal(err)
		}
	}
	if err := n.WaitRoutable(t.Context()); err != nil { // after the restart
		t.Fatal(err)
	}
	if out := ctl("identity"); !strings.Contains(out, "demo") || !strings.Contains(out, "by token") {
		t.Errorf("%s", out)
	}
	unbind()
	ctl("bind", "--email", "ann@net")
	if out := ctl("bind", "--code", mailed(t)); !strings.Contains(out, "is bound to email-") || strings.Contains(out, "ann") {
		t.Errorf("%s", out)
	}
	if err := n.WaitRoutable(t.Context()); err != nil {
		t.Fatal(err)
	}
	unbind()
	bindWallet(t, n, ctl)
	if err := n.WaitRoutable(t.Context()); err != nil {
		t.Fatal(err)
	}
	st, err := n.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	history := on(t, "resultity-network", "nodes", "show", st.Node)
	for _, want := range []string{`bind +demo +token +owner`, `unbind +demo +token +node`, `bind +email-\w+ +email +owner`, `unbind +email-\w+ +email +node`, `bind +0x\w+ +wallet +owner`} {
		if !regexp.MustCompile(want).MatchString(history) {
			t.Errorf("no %q in\n%s", want, history)
		}
	}
	if out := on(t, "resultity-network", "accounts", "list"); !regexp.MustCompile(`(?m)^demo +1$`).MatchString(out) || strings.Contains(out, "ann@") {
		t.Errorf("%s", out)
	}
	if log := on(t, "journalctl", "--no-pager", "-u", "resultity-network"); strings.Contains(log, "ann@") || !strings.Contains(log, "mail sent") {
		t.Error("the network logs an address, or nothing of the mail")
	}
}

// bindWallet has ethers sign what resultityctl prints.
func bindWallet(t *testing.T, n *stack.Node, ctl func(...string) string) {
	t.Helper()
	key, err := evm.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	const file = "/tmp/typed.json"
	wallet := key.Address().Hex()
	ctl("bind", "--wallet", wallet, "--typed-data", file)
	data, err := n.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	sig, err := clients.Run(t.Context(), "sign.mjs", data, "PRIVATE_KEY=0x"+key.Hex())
	if err != nil {
		t.Fatal(err)
	}
	if out := ctl("bind", "--wallet", wallet, "--typed-data", file, "--signature", sig); !strings.Contains(out, "is bound to "+wallet) {
		t.Errorf("%s", out)
	}
}
