// A small server whose only filter is the apiserver's own goaway filter: what `steer` is tried on, ready in a second.
//
// GET /bench?n=N asks the filter N times inside the process, as N requests of one connection would, and answers with
// the nanoseconds each took; /hold answers its first octets at once and its end when the client has sent its own.
package main

import (
	"crypto/tls"
	"crypto/x509"
	"flag"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"time"

	"k8s.io/apiserver/pkg/server/filters"
)

type nowhere struct{ header http.Header }

func (n *nowhere) Header() http.Header         { return n.header }
func (n *nowhere) Write(b []byte) (int, error) { return len(b), nil }
func (n *nowhere) WriteHeader(int)             {}

// withRoom has a request's stack grow before next is called: one that has grown stays so until a garbage collection.
//
// Go moves a stack when it grows, and ends the program where a return address of it is not one of its own, as the kernel's
// is that a probe on a return puts there.
func withRoom(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		grow(16)
		next.ServeHTTP(w, r)
	})
}

//go:noinline
func grow(left int) byte {
	var room [4096]byte
	room[left] = byte(left)
	if left > 0 {
		return room[left] + grow(left-1)
	}
	return room[0]
}

func main() {
	listen := flag.String("listen", "127.0.0.1:6443", "address and port")
	certificate := flag.String("tls-cert-file", "", "certificate (PEM)")
	key := flag.String("tls-private-key-file", "", "its key (PEM)")
	authority := flag.String("client-ca-file", "", "who signs client certificates (PEM)")
	origin := flag.Int64("origin-ms", 0, "milliseconds since 1970 of the first resourceVersion")
	period := flag.Duration("period", time.Second, "time between two changes of the object")
	chance := flag.Float64("goaway-chance", 0, "as kube-apiserver's flag")
	roomy := flag.Bool("roomy-stacks", false, "let each request's stack grow before the filter is asked, and never again")
	ask := flag.Bool("ask", true, "ask the filter for each request; else it is there and never asked")
	flag.Parse()

	routes := http.NewServeMux()
	routes.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) { fmt.Fprintln(w, r.Proto) })
	routes.HandleFunc("/version", func(w http.ResponseWriter, r *http.Request) { fmt.Fprintln(w, runtime.Version()) })
	routes.HandleFunc("/hold", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintln(w, "begun")
		w.(http.Flusher).Flush()
		io.Copy(io.Discard, r.Body)
		fmt.Fprintln(w, "done")
	})
	history{origin: time.UnixMilli(*origin), period: *period}.register(routes)
	filtered := http.Handler(routes)
	if *chance > 0 && *ask {
		filtered = filters.WithProbabilisticGoaway(routes, *chance)
	}
	if *roomy {
		debug.SetGCPercent(-1)
		filtered = withRoom(filtered)
	}
	empty := http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})
	asked := filters.WithProbabilisticGoaway(empty, *chance)
	routes.HandleFunc("/bench", func(w http.ResponseWriter, r *http.Request) {
		n, err := strconv.Atoi(r.URL.Query().Get("n"))
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		answer := &nowhere{header: http.Header{}}
		began := time.Now()
		for range n {
			asked.ServeHTTP(answer, r)
		}
		fmt.Fprintf(w, "%.1f\n", float64(time.Since(began).Nanoseconds())/float64(n))
	})
	config := &tls.Config{NextProtos: []string{"h2", "http/1.1"}}
	if *authority != "" {
		pem, err := os.ReadFile(*authority)
		if err != nil {
			log.Fatal(err)
		}
		config.ClientCAs = x509.NewCertPool()
		config.ClientCAs.AppendCertsFromPEM(pem)
		config.ClientAuth = tls.VerifyClientCertIfGiven
	}
	server := &http.Server{Addr: *listen, Handler: filtered, TLSConfig: config}
	log.Fatal(server.ListenAndServeTLS(*certificate, *key))
}
