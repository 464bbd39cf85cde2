// The inference extension's conformance suite, unmodified, with the pickers of somebody else.
//
// BASE_MANIFESTS names a folder whose base.yaml takes the place of the suite's own base manifests;
// without it the suite runs as it is. All other settings are the suite's own flags.
package suite

import (
	"io/fs"
	"os"
	"testing"

	"sigs.k8s.io/gateway-api-inference-extension/conformance"
)

func TestConformance(t *testing.T) {
	options := conformance.DefaultOptions(t)
	if folder := os.Getenv("BASE_MANIFESTS"); folder != "" {
		options.BaseManifests = "base.yaml"
		options.ManifestFS = append([]fs.FS{os.DirFS(folder)}, options.ManifestFS...)
	}
	conformance.RunConformanceWithOptions(t, options)
}
