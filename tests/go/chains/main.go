// Makes certificate chains of every shape, and says what Go's crypto/x509 says of each for client authentication, as
// kube-apiserver asks it (k8s.io/apiserver/pkg/authentication/request/x509), and for a server, as its clients ask it: one
// JSON object a line.
package main

import (
	"bufio"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"encoding/json"
	"os"
	"time"
)

// How many certificates are made with octets changed at random.
const mutations = 1500

type line struct {
	Name    string   `json:"name"`
	Roots   []string `json:"roots"` // hexadecimal
	Chain   []string `json:"chain"`
	Now     int64    `json:"now"`
	Verdict string   `json:"verdict"` // good, refused, chain (does not parse), roots (does not parse)
	Error   string   `json:"error"`
	Until   int64    `json:"until"`
	// The same chain as a server's: how long it is good, 0 when it is refused, and for which of the hosts.
	ServerUntil int64    `json:"server_until"`
	Hosts       []string `json:"hosts"`
	User    string   `json:"user"`
	Groups  []string `json:"groups"`
	UIDs    []string `json:"uids"`
}

var now = time.Date(2026, 6, 15, 12, 0, 0, 0, time.UTC)

// Whom a server may be asked for.
var hosts = []string{"example.com", "www.example.com", "WWW.Example.Com.", "a.www.example.com", "a.b", "other", "10.0.0.1", "::"}

func end(paths [][]*x509.Certificate) (until int64) {
	for i, path := range paths {
		end := path[0].NotAfter.Unix()
		for _, c := range path {
			end = min(end, c.NotAfter.Unix())
		}
		if i == 0 || end > until {
			until = end
		}
	}
	return until
}

func judge(l *line, of testCase) {
	roots, others := x509.NewCertPool(), x509.NewCertPool()
	for _, n := range of.roots {
		c, err := x509.ParseCertificate(n.der)
		if err != nil {
			l.Verdict, l.Error = "roots", err.Error()
			return
		}
		roots.AddCert(c)
	}
	var chain []*x509.Certificate
	for _, n := range of.chain {
		c, err := x509.ParseCertificate(n.der)
		if err != nil {
			l.Verdict, l.Error = "chain", err.Error()
			return
		}
		chain = append(chain, c)
	}
	for _, c := range chain[1:] {
		others.AddCert(c)
	}
	subject := chain[0].Subject
	l.User, l.Groups, l.UIDs = subject.CommonName, subject.Organization, uids(subject)
	asServer := x509.VerifyOptions{Roots: roots, Intermediates: others, CurrentTime: now}
	if paths, err := chain[0].Verify(asServer); err == nil {
		l.ServerUntil = end(paths)
		for _, host := range hosts {
			asServer.DNSName = host
			if _, err := chain[0].Verify(asServer); err == nil {
				l.Hosts = append(l.Hosts, host)
			}
		}
	}
	paths, err := chain[0].Verify(x509.VerifyOptions{
		Roots: roots, Intermediates: others, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
	if err != nil {
		l.Verdict, l.Error = "refused", err.Error()
		return
	}
	l.Verdict, l.Until = "good", end(paths)
}

func uids(subject pkix.Name) []string {
	var out []string
	for _, a := range subject.Names {
		if a.Type.Equal(asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 57683, 2}) {
			out = append(out, a.Value.(string))
		}
	}
	return out
}

func main() {
	build()
	out := bufio.NewWriter(os.Stdout)
	defer out.Flush()
	encoder := json.NewEncoder(out)
	for _, c := range cases {
		l := line{Name: c.name, Now: now.Unix()}
		for _, n := range c.roots {
			l.Roots = append(l.Roots, hex.EncodeToString(n.der))
		}
		for _, n := range c.chain {
			l.Chain = append(l.Chain, hex.EncodeToString(n.der))
		}
		judge(&l, c)
		if err := encoder.Encode(l); err != nil {
			panic(err)
		}
	}
}
