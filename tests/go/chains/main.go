// Makes certificate chains of every shape, and says what Go's crypto/x509 says of each for client authentication, as
// kube-apiserver asks it (k8s.io/apiserver/pkg/authentication/request/x509): one JSON object a line.
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
	User    string   `json:"user"`
	Groups  []string `json:"groups"`
	UIDs    []string `json:"uids"`
}

var now = time.Date(2026, 6, 15, 12, 0, 0, 0, time.UTC)

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
	paths, err := chain[0].Verify(x509.VerifyOptions{
		Roots: roots, Intermediates: others, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
	if err != nil {
		l.Verdict, l.Error = "refused", err.Error()
		return
	}
	l.Verdict = "good"
	for i, path := range paths {
		end := path[0].NotAfter.Unix()
		for _, c := range path {
			end = min(end, c.NotAfter.Unix())
		}
		if i == 0 || end > l.Until {
			l.Until = end
		}
	}
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
