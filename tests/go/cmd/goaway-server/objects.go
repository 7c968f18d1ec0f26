package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"
	"time"
)

// history is the one object the demo's clients list and watch, as the stand-in apiserver has it: it changes once a
// period, and its resourceVersion is the number of periods since an instant that all servers are told.
type history struct {
	origin time.Time
	period time.Duration
}

func (h history) version() int64 { return 1 + int64(time.Since(h.origin)/h.period) }

func (h history) begins(version int64) time.Time {
	return h.origin.Add(time.Duration(version-1) * h.period)
}

func object(version int64) map[string]any {
	text := strconv.FormatInt(version, 10)
	return map[string]any{
		"kind": "ConfigMap", "apiVersion": "v1",
		"metadata": map[string]any{"name": "shared", "namespace": "swarm", "resourceVersion": text},
		"data":     map[string]any{"counter": text},
	}
}

func answer(w http.ResponseWriter, value any) {
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(value)
}

func (h history) list(w http.ResponseWriter, r *http.Request) {
	if r.URL.Query().Get("watch") == "true" {
		h.watch(w, r)
		return
	}
	version := h.version()
	answer(w, map[string]any{
		"kind": "ConfigMapList", "apiVersion": "v1",
		"metadata": map[string]any{"resourceVersion": strconv.FormatInt(version, 10)},
		"items":    []any{object(version)},
	})
}

func (h history) watch(w http.ResponseWriter, r *http.Request) {
	from, err := strconv.ParseInt(r.URL.Query().Get("resourceVersion"), 10, 64)
	if err != nil {
		http.Error(w, "a watch names its resourceVersion", http.StatusBadRequest)
		return
	}
	// As --min-request-timeout has it, spread by the version.
	ends := time.Now().Add(30*time.Minute + time.Duration(from%1800)*time.Second)
	w.Header().Set("Content-Type", "application/json")
	w.(http.Flusher).Flush()
	for next := from + 1; h.begins(next).Before(ends); next++ {
		select {
		case <-r.Context().Done():
			return
		case <-time.After(time.Until(h.begins(next))):
		}
		answer(w, map[string]any{"type": "MODIFIED", "object": object(next)})
		w.(http.Flusher).Flush()
	}
}

func (h history) register(routes *http.ServeMux) {
	routes.HandleFunc("/api/v1/namespaces/swarm/configmaps", h.list)
	routes.HandleFunc("/api/v1/namespaces/swarm/configmaps/shared", func(w http.ResponseWriter, _ *http.Request) {
		answer(w, object(h.version()))
	})
	for _, path := range []string{"/readyz", "/livez", "/healthz"} {
		routes.HandleFunc(path, func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "ok") })
	}
}
