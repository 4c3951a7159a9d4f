// Package llamacpp is the recipe of the runtime image with llama.cpp's server,
// for models in GGUF format on the CPU.
//
// The rule it keeps: the image holds llama-server, every CPU variant of its
// compute back end, and the libraries they load; no other program.
package llamacpp

import "github.com/resultity/node/packaging/images"

// Recipe returns the recipe.
func Recipe() images.Recipe {
	return images.Recipe{
		Name:        "llamacpp",
		Title:       "Resultity runtime: llama.cpp",
		Description: "llama.cpp's server with its CPU back ends, and nothing else",
		Suite:       "forky",
		// base-files has the texts of the licences and os-release.
		Packages:  []string{"llama.cpp-tools", "base-files"},
		VersionOf: "llama.cpp-tools",
		Programs:  []string{"/usr/bin/llama-server"},
		// The server looks into this directory and takes the variant that
		// fits the processor best.
		Plugins:    []string{"/usr/lib/*/ggml/backends*/libggml-cpu*.so"},
		Data:       []string{"/etc/os-release"},
		Entrypoint: []string{"/usr/bin/llama-server"},
		Licences: map[string]string{
			"base-files":      "GPL-2.0-or-later",
			"gcc-16-base":     "GPL-3.0-or-later WITH GCC-exception-3.1",
			"libc6":           "LGPL-2.1-or-later",
			"libgcc-s1":       "GPL-3.0-or-later WITH GCC-exception-3.1",
			"libggml0":        "MIT",
			"libgomp1":        "GPL-3.0-or-later WITH GCC-exception-3.1",
			"libllama0":       "MIT",
			"libssl3t64":      "Apache-2.0",
			"libstdc++6":      "GPL-3.0-or-later WITH GCC-exception-3.1",
			"libzstd1":        "BSD-3-Clause OR GPL-2.0-only",
			"llama.cpp-tools": "MIT",
			"zlib1g":          "Zlib",
		},
	}
}
