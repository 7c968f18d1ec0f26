// A program with a goaway decider in it, for every release of Go that can be had.
package main

import "k8s.io/apiserver/pkg/server/filters"

var decider = filters.New(0.5, func() float64 { return 0.25 })

func main() {
	println(decider.Goaway(&filters.Request{}))
}
