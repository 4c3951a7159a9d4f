// Command engine is the hostile engine of package hostile.
package main

import (
	"os"

	"github.com/resultity/node/test/hostile"
)

func main() { hostile.Main(os.Args) }
