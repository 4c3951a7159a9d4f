package image

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"runtime"
	"strings"
	"sync/atomic"
	"time"

	"github.com/resultity/node/internal/digest"
	"github.com/resultity/node/internal/snapshot"
)

// offerer is the part of Podman's API that a probe needs.
type offerer interface {
	// Offer pulls like podman.Pull, whatever the registry's certificate.
	Offer(ctx context.Context, ref snapshot.ImageRef) error
	RemoveImages(ctx context.Context, pulled, keep []snapshot.ImageRef) (gone []snapshot.ImageRef, err error)
}

// Refusal is what the two locks said to an image that nobody has signed.
type Refusal struct {
	Agent  error // of the check before a pull; [ErrUnsigned], if all is well
	Podman error // of the pull; podman's own kind of error, and nil when it let the image in
	Asked  bool  // Podman has read the image's manifest: what it said is about the image
}

// ProbeUnsigned makes an image that nobody has signed, serves it on a loopback
// address, and offers it to both locks under the policy in force. What Podman
// lets in is removed again. Trust is what the agent would check with. The error is
// about the probe itself.
func ProbeUnsigned(ctx context.Context, p offerer, t *snapshot.ImageTrust) (r Refusal, err error) {
	whom, _, err := under(t, t)
	if err != nil {
		return r, err
	}
	reg, err := serveUnsigned()
	if err != nil {
		return r, fmt.Errorf("registry of the probe: %w", err)
	}
	defer func() { err = errors.Join(err, reg.close()) }()
	i := &Images{stall: stallTimeout, transport: &http.Transport{
		TLSClientConfig:   &tls.Config{RootCAs: reg.roots, MinVersion: tls.VersionTLS12},
		DisableKeepAlives: true, // nothing to close
	}}
	_, _, r.Agent = i.find(ctx, reg.ref, whom)
	before := reg.manifests.Load()
	r.Podman = p.Offer(ctx, reg.ref)
	r.Asked = reg.manifests.Load() > before
	if r.Podman == nil {
		_, err = p.RemoveImages(context.WithoutCancel(ctx), []snapshot.ImageRef{reg.ref}, nil)
	}
	return r, err
}

// unsigned is a registry of one image, and nothing beside it.
type unsigned struct {
	ref       snapshot.ImageRef
	roots     *x509.CertPool
	manifests atomic.Int64 // times that the manifest was asked for
	server    *http.Server
	done      chan error
}

func (u *unsigned) close() error {
	err := u.server.Close()
	if served := <-u.done; !errors.Is(served, http.ErrServerClosed) {
		err = errors.Join(err, served)
	}
	return err
}

const unsignedName = "resultity-doctor/unsigned"

func serveUnsigned() (*unsigned, error) {
	manifest, blobs, err := tinyImage()
	if err != nil {
		return nil, err
	}
	cert, leaf, err := loopbackCertificate()
	if err != nil {
		return nil, err
	}
	u := &unsigned{roots: x509.NewCertPool(), done: make(chan error, 1)}
	u.roots.AddCert(leaf)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	top := digest.Of(manifest)
	if u.ref, err = snapshot.ParseImageRef(l.Addr().String() + "/" + unsignedName + "@" + top.String()); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	u.server = &http.Server{
		TLSConfig:         &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12},
		ReadHeaderTimeout: 10 * time.Second, ErrorLog: log.New(io.Discard, "", 0),
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			base := "/v2/" + unsignedName
			blob, known := blobs[strings.TrimPrefix(r.URL.Path, base+"/blobs/")]
			switch {
			case r.URL.Path == "/v2/":
			case r.URL.Path == base+"/manifests/"+top.String():
				u.manifests.Add(1)
				w.Header().Set("Content-Type", manifestType)
				w.Header().Set("Docker-Content-Digest", top.String())
				_, _ = w.Write(manifest) // whoever has gone does not want it
			case known:
				w.Header().Set("Content-Type", "application/octet-stream")
				_, _ = w.Write(blob) // likewise
			default:
				http.NotFound(w, r)
			}
		}),
	}
	go func() { u.done <- u.server.ServeTLS(l, "", "") }()
	return u, nil
}

const manifestType = "application/vnd.oci.image.manifest.v1+json"

// tinyImage makes an image of one small file that no registry has seen before.
func tinyImage() (manifest []byte, blobs map[string][]byte, err error) {
	var layer, plain bytes.Buffer
	t := tar.NewWriter(&plain)
	nonce := make([]byte, 16)
	_, _ = rand.Read(nonce) // never fails
	if err := t.WriteHeader(&tar.Header{Name: "unsigned", Mode: 0o444, Size: int64(len(nonce))}); err != nil {
		return nil, nil, err
	}
	if _, err := t.Write(nonce); err != nil {
		return nil, nil, err
	}
	if err := t.Close(); err != nil {
		return nil, nil, err
	}
	z := gzip.NewWriter(&layer)
	if _, err := z.Write(plain.Bytes()); err != nil {
		return nil, nil, err
	}
	if err := z.Close(); err != nil {
		return nil, nil, err
	}
	config, err := json.Marshal(map[string]any{
		"architecture": runtime.GOARCH, "os": "linux", "config": map[string]any{},
		"rootfs": map[string]any{"type": "layers", "diff_ids": []string{digest.Of(plain.Bytes()).String()}},
	})
	if err != nil {
		return nil, nil, err
	}
	blobs = map[string][]byte{}
	describe := func(mediaType string, raw []byte) map[string]any {
		d := digest.Of(raw).String()
		blobs[d] = raw
		return map[string]any{"mediaType": mediaType, "digest": d, "size": len(raw)}
	}
	manifest, err = json.Marshal(map[string]any{
		"schemaVersion": 2, "mediaType": manifestType,
		"config": describe("application/vnd.oci.image.config.v1+json", config),
		"layers": []any{describe("application/vnd.oci.image.layer.v1.tar+gzip", layer.Bytes())},
	})
	return manifest, blobs, err
}

// loopbackCertificate makes one that is its own authority, for some minutes.
func loopbackCertificate() (tls.Certificate, *x509.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, nil, err
	}
	now := time.Now()
	t := &x509.Certificate{
		SerialNumber: big.NewInt(1), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, NotBefore: now.Add(-time.Hour), NotAfter: now.Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
	}
	raw, err := x509.CreateCertificate(rand.Reader, t, t, &key.PublicKey, key)
	if err != nil {
		return tls.Certificate{}, nil, err
	}
	leaf, err := x509.ParseCertificate(raw)
	return tls.Certificate{Certificate: [][]byte{raw}, PrivateKey: key}, leaf, err
}
