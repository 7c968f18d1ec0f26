// Backend answers like a small apiserver for the relay's benchmark: objects of about 1.5 KiB, and watches that send
// events of about 1 KiB, over TLS by plain net/http. It sends and takes 64 MiB for transfers, and tells what it has served on a second, plain port.
package main

import (
	"bytes"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

var requests, watches, events, connections, octets atomic.Int64

// counted adds up what was moved as it moves: a transfer is longer than a measurement.
type counted struct{ io.Writer }

func (c counted) Write(piece []byte) (int, error) {
	n, err := c.Writer.Write(piece)
	octets.Add(int64(n))
	return n, err
}

// transfer sends 64 MiB, or takes whatever it is sent.
func transfer(w http.ResponseWriter, r *http.Request) {
	if r.Method == http.MethodPost {
		io.Copy(counted{io.Discard}, r.Body)
		return
	}
	piece := make([]byte, 1<<18)
	for range 256 {
		if _, err := (counted{w}).Write(piece); err != nil {
			return
		}
	}
}

// object is JSON of about the size, with the shape of a pod as far as its length matters.
func object(kind string, size int) []byte {
	var text bytes.Buffer
	fmt.Fprintf(&text, `{"kind":%q,"apiVersion":"v1","metadata":{"name":"web-0","namespace":"default","labels":{`, kind)
	for label := 0; text.Len() < size-4; label++ {
		if label > 0 {
			text.WriteByte(',')
		}
		fmt.Fprintf(&text, `"example.com/label-%d":"value-%d"`, label, label)
	}
	text.WriteString("}}}\n")
	return text.Bytes()
}

// watch sends an event every period until the client goes; without a period one event only.
func watch(w http.ResponseWriter, r *http.Request, event []byte) {
	watches.Add(1)
	defer watches.Add(-1)
	flusher := w.(http.Flusher)
	send := func() bool {
		if _, err := w.Write(event); err != nil {
			return false
		}
		flusher.Flush()
		events.Add(1)
		return true
	}
	if !send() {
		return
	}
	period, err := strconv.Atoi(r.URL.Query().Get("period_us"))
	if err != nil || period <= 0 {
		<-r.Context().Done()
		return
	}
	ticks := time.NewTicker(time.Duration(period) * time.Microsecond)
	defer ticks.Stop()
	for {
		select {
		case <-r.Context().Done():
			return
		case <-ticks.C:
			if !send() {
				return
			}
		}
	}
}

func main() {
	listen := flag.String("listen", "", "address of the TLS port")
	certificate := flag.String("cert", "", "serving certificate (PEM)")
	key := flag.String("key", "", "its key (PEM)")
	figures := flag.String("figures", "", "address of the plain port that tells what was served")
	flag.Parse()

	pod, event := object("Pod", 1536), object("WatchEvent", 1024)
	api := http.NewServeMux()
	api.HandleFunc("/readyz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "ok") })
	api.HandleFunc("/api/v1/", func(w http.ResponseWriter, r *http.Request) {
		header := w.Header()
		header.Set("Audit-Id", "3f1d3f5e-6a0b-4d5c-9f57-2d3f1b1f6d0e")
		header.Set("Cache-Control", "no-cache, private")
		header.Set("Content-Type", "application/json")
		header.Set("X-Kubernetes-Pf-Flowschema-Uid", "b7d3c8a5-7c1b-4f0e-a6a2-5f5d7f0a9a11")
		header.Set("X-Kubernetes-Pf-Prioritylevel-Uid", "0f6f0f52-2d8e-4f4b-8f0c-6a9f4c8d1e22")
		if strings.Contains(r.URL.RawQuery, "watch=true") {
			watch(w, r, event)
			return
		}
		w.Write(pod)
		requests.Add(1)
	})
	api.HandleFunc("/transfer", transfer)
	go func() {
		tell := http.NewServeMux()
		tell.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) {
			fmt.Fprintf(w, `{"requests":%d,"watches":%d,"events":%d,"connections":%d,"octets":%d}`,
				requests.Load(), watches.Load(), events.Load(), connections.Load(), octets.Load())
		})
		log.Fatal(http.ListenAndServe(*figures, tell))
	}()
	server := http.Server{
		Addr:    *listen,
		Handler: api,
		ConnState: func(_ net.Conn, state http.ConnState) {
			switch state {
			case http.StateNew:
				connections.Add(1)
			case http.StateClosed, http.StateHijacked:
				connections.Add(-1)
			}
		},
	}
	log.Fatal(server.ListenAndServeTLS(*certificate, *key))
}
