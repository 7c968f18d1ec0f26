// Renders a chart as `helm template` does, with Helm's own packages: its command line is three minutes of a processor to
// build, and this some seconds.
//
// chart DIRECTORY NAMESPACE [KEY=VALUE ...]: objects on stdout, or one error on stderr.
package main

import (
	"fmt"
	"os"
	"sort"
	"strings"

	"helm.sh/helm/v3/pkg/chart/loader"
	"helm.sh/helm/v3/pkg/chartutil"
	"helm.sh/helm/v3/pkg/engine"
	"helm.sh/helm/v3/pkg/strvals"
)

func main() {
	if err := render(os.Args[1], os.Args[2], os.Args[3:]); err != nil {
		fmt.Fprintln(os.Stderr, "Error:", err)
		os.Exit(1)
	}
}

func render(directory, namespace string, set []string) error {
	chart, err := loader.Load(directory)
	if err != nil {
		return err
	}
	if err := chart.Validate(); err != nil {
		return err
	}
	values := map[string]interface{}{}
	for _, one := range set {
		if err := strvals.ParseInto(one, values); err != nil {
			return err
		}
	}
	options := chartutil.ReleaseOptions{Name: "rebalancer", Namespace: namespace, Revision: 1, IsInstall: true}
	capabilities := chartutil.DefaultCapabilities.Copy()
	capabilities.KubeVersion = chartutil.KubeVersion{Version: "v1.36.2", Major: "1", Minor: "36"}
	// It checks the values against the chart's schema, too.
	top, err := chartutil.ToRenderValues(chart, values, options, capabilities)
	if err != nil {
		return err
	}
	// As `helm lint --strict`: a value that is missing is an error.
	files, err := engine.Engine{Strict: true}.Render(chart, top)
	if err != nil {
		return err
	}
	names := make([]string, 0, len(files))
	for name := range files {
		if strings.HasSuffix(name, ".yaml") {
			names = append(names, name)
		}
	}
	sort.Strings(names)
	for _, name := range names {
		fmt.Printf("---\n# Source: %s\n%s\n", name, files[name])
	}
	return nil
}
